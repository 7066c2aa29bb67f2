"""`mirage-ds config`, the commands. Imports stay inside them: `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirage_ds.config.flags import CONTEXT
from mirage_ds.errors import UserError
from mirage_ds.files import Output, write_atomically

if TYPE_CHECKING:
    from mirage_ds.config.importing import Imported


@click.group(context_settings=CONTEXT)
def config() -> None:
    """Settings files of training runs."""


@config.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=Output(), help="Settings file to write; without it, it is printed.")
@click.option(
    "--stage",
    default="sft",
    show_default=True,
    type=click.Choice(["sft", "stage1", "stage2"]),
    help="What the run trains: theirs is sft; stage1 and stage2 train latents.",
)
@click.option("--ranks", type=click.IntRange(min=1), help="GPUs in all, where FILE does not say how many.")
def import_(file: Path, out: Path | None, stage: str, ranks: int | None) -> None:
    """Turn FILE, a configuration of LLaMA-Factory or ms-swift, into a settings file.

    FILE is LLaMA-Factory's YAML or JSON, or ms-swift's YAML, JSON or shell script with `swift sft`. Tables say what is
    carried over, what has no counterpart, and what has to be given still. Start it where the trainer is started.
    """
    from mirage_ds.config.importing import import_config

    if out is not None and out.exists():
        raise UserError(f"--out {out}: is there already; name another file")
    made = import_config(file, stage, ranks)  # type: ignore[arg-type]
    _tell(made, on_stderr=out is None)
    if out is None:
        click.echo(made.as_yaml(), nl=False)
    else:
        write_atomically(out, made.as_yaml())
        click.echo(f"{out}: {len(made.settings)} settings; train with --config {out}")


def _tell(made: Imported, on_stderr: bool) -> None:
    """Print what became of each of their settings, and the commands that make records of their data."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=on_stderr)
    tables = (
        ("carried over", (made.source.trainer, "here", "value"), made.carried),
        ("no counterpart", (made.source.trainer, "why"), made.left.items()),
        ("to be given still", ("setting", "what"), made.missing.items()),
    )
    for title, head, rows in tables:
        table = Table(title=title)
        for name in head:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        if table.row_count:
            console.print(table)
    if made.commands:
        console.print("records first:", *made.commands, sep="\n", soft_wrap=True, highlight=False, markup=False)
