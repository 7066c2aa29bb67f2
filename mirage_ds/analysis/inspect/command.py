"""`mirage-ds inspect`, the command. Imports stay inside it: `--help` is quick."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from mirage_ds.analysis.inspect.spec import InspectSpec
from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.files import check_output


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(InspectSpec)
def inspect(folder: Path, **flags: Any) -> None:
    """Show what the latents look at and stand for.

    Of the model in FOLDER: what its latents look at, which words are near, who attends to them. Writes one page with
    pictures of the chosen rows; and over the file's rows the latents' principal components and what a linear probe
    reads from them.
    """
    from mirage_ds.analysis.inspect.study import inspect_file
    from mirage_ds.data.progress import track

    spec = build_model(InspectSpec, flags)
    check_output(spec.out, "--out", folder=True)
    page, said = inspect_file(folder, spec, partial(track, title="running rows"))
    click.echo(f"{page}\n{said}")
