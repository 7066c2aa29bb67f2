"""`mirage-ds status`. Imports stay inside the commands: `--help` is quick."""

import json
import sys
import time
from pathlib import Path

import click

# Letters of a table's line where no terminal sets them.
WIDE = 200


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--watch", type=click.FloatRange(min=0.2), metavar="SECONDS", help="Look again and again, until Ctrl-C.")
def status(runs: tuple[Path, ...], wants_json: bool, watch: float | None) -> None:
    """Show how far runs are and what went wrong.

    Of one run it is a page, of several a line each. RUNS are --save_model_path folders. Only their files are read;
    nothing is written, no process is asked.
    """
    from rich.console import Console

    from mirage_ds.cluster.status.facts import Facts, find_run
    from mirage_ds.cluster.status.show import print_one, print_several
    from mirage_ds.cluster.status.summary import summary
    from mirage_ds.errors import Stopped

    # A line of a file or a pipe is as long as it is.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    folders = [find_run(run) for run in runs]
    try:
        while True:
            found = [summary(Facts(folder), time.time()) for folder in folders]
            if wants_json:
                click.echo(json.dumps(found[0] if len(found) == 1 else {"runs": found}, ensure_ascii=False))
            else:
                if watch and console.is_terminal:
                    console.clear()
                if len(found) == 1:
                    print_one(found[0], console)
                else:
                    print_several(found, console)
            if watch is None:
                return
            time.sleep(watch)
            if not wants_json and not console.is_terminal:
                console.print()
    except Stopped:
        # Somebody has seen enough.
        return
