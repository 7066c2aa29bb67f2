"""`python -m mirage_ds.evaluate …`, which launchers start: the command of that name."""

from mirage_ds.evaluate.command import main

main()
