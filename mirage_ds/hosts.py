"""`python -m mirage_ds.hosts`, as launch scripts from before there was mirage_ds/cluster call it."""

from mirage_ds.cluster.hosts import main

if __name__ == "__main__":
    main()
