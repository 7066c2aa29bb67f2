"""`mirage-ds status` and `mirage-ds curves`. Imports stay inside the commands: `--help` is quick."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from mirage_ds.errors import UserError
from mirage_ds.files import Output

# Letters of a table's line where no terminal sets them.
WIDE = 200


def _path() -> click.Path:
    return click.Path(path_type=Path)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=_path())
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--watch", type=click.FloatRange(min=0.2), metavar="SECONDS", help="Look again and again, until Ctrl-C.")
def status(runs: tuple[Path, ...], wants_json: bool, watch: float | None) -> None:
    """Show how far each of RUNS is and what went wrong: a page for one run, a line each for several.

    RUNS are --save_model_path folders. Only their files are read; nothing is written, no process is asked.
    """
    from rich.console import Console

    from mirage_ds.cluster.status.facts import find_run, read_facts
    from mirage_ds.cluster.status.show import print_one, print_several
    from mirage_ds.cluster.status.summary import summary
    from mirage_ds.errors import Stopped

    console = Console(highlight=False)
    if not console.is_terminal:
        # A line of a file or a pipe is as long as it is.
        console = Console(highlight=False, width=WIDE)
    folders = [find_run(run) for run in runs]
    try:
        while True:
            found = [summary(read_facts(folder), time.time()) for folder in folders]
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


@click.command()
@click.argument("runs", nargs=-1, required=True, type=_path())
@click.option("--out", required=True, type=Output(), help="The picture, .png or .svg.")
@click.option("--metric", "metrics", help="What of log.jsonl is drawn, with commas. [default: loss, and eval_loss]")
@click.option("--smooth", type=click.IntRange(min=1), help="Steps of the mean. [default: a fiftieth of the longest]")
@click.option("--against", default="step", show_default=True, type=click.Choice(["step", "rows", "tokens", "seconds"]))
def curves(runs: tuple[Path, ...], out: Path, metrics: str | None, smooth: int | None, against: str) -> None:
    """Draw metrics of several RUNS into one picture: a panel a metric, a colour a run.

    RUNS are --save_model_path folders, their names shortened to what differs.
    """
    from mirage_ds.analysis.inspect.live import need_matplotlib
    from mirage_ds.cluster.status.facts import find_run

    if out.suffix not in (".png", ".svg"):
        raise UserError(f"--out {out}: write a name that ends in .png or .svg")
    folders = [find_run(run) for run in runs]
    need_matplotlib()
    from mirage_ds.cluster.status.curves import draw_runs

    wanted = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    click.echo(draw_runs(folders, out, wanted, smooth, against))
