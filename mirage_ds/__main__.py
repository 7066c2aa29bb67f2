"""`python -m mirage_ds`: the command line, where there is no `mirage-ds` on the path."""

from mirage_ds.cli import main

if __name__ == "__main__":
    main()
