"""`python -m mirage_ds.replay …`, which launchers start: the command of that name."""

from mirage_ds.replay.command import main

main()
