"""`mirage-ds`, also as `python -m mirage_ds`: listens to Ctrl-C before it imports anything that takes time."""

from mirage_ds.run.stop import leave_on_signals


def main() -> None:
    """Run the command line."""
    leave_on_signals()
    from mirage_ds.cli import main as run

    run()


if __name__ == "__main__":
    main()
