"""`mirage-ds inspect`: its flags and the command. Imports stay inside it: `--help` is quick."""

from functools import partial
from pathlib import Path
from typing import Any

import click
from pydantic import Field, NonNegativeInt, PositiveInt

from mirage_ds.config.extras import need
from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.evaluate.spec import DataSpec, FolderSpec, HelperSpec
from mirage_ds.files import check_output


class InspectSpec(HelperSpec, FolderSpec, DataSpec):
    """What is looked at."""

    out: Path = Field(description="New folder for index.html, the pictures and numbers.json.")
    rows: tuple[NonNegativeInt, ...] = Field((), description="Rows shown in detail, counted from 0. [default: 0]")
    decode: bool = Field(False, description="Decode these rows too; maps with two shortest paths with each path.")
    max_new_tokens: PositiveInt = Field(256, description="With --decode: tokens of an answer, at most.")
    most: PositiveInt = Field(1000, description="Rows that the components and the probe are made of.")
    label: tuple[str, ...] = Field((), description="Record keys that the probe predicts; text_output: the answer.")
    latent_size: PositiveInt | None = Field(None, description="k; as the model was trained if not set.")


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(InspectSpec)
def inspect(folder: Path, **flags: Any) -> None:
    """Show what the latents look at and stand for.

    It writes one page. For the chosen rows: what the latents of the model in FOLDER look at, which words are near, and
    what attends to them. For all rows: principal components, and what a linear probe reads from the latents.
    """
    need("plot", "inspect")
    from mirage_ds.analysis.inspect.study import inspect_file
    from mirage_ds.data.progress import track
    from mirage_ds.data.record import blamed

    spec = build_model(InspectSpec, flags)
    check_output(spec.out, "--out", folder=True)
    with blamed(f"{spec.data_path}: record on "):
        page, said = inspect_file(folder, spec, partial(track, title="running rows"))
    click.echo(f"{page}\n{said}")
