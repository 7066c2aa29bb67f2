"""`python -m mirage_ds.cluster.replay …`, which launchers start: the command of that name."""

from mirage_ds.cluster.replay.command import main

main()
