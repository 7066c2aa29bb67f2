"""`mirage-ds inspect`, the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mirage_ds.errors import UserError
from mirage_ds.files import Output


def _path() -> click.Path:
    return click.Path(path_type=Path)


def read_rows(text: str) -> list[int]:
    """Read "0,5,9"; UserError unless it is a list of different whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(
        parts
    ):
        raise UserError(f"--rows {text}: write different row numbers, counted from 0, with commas between them")
    return [int(part) for part in parts]


@click.command()
@click.argument("folder", type=_path())
@click.option("--data_path", required=True, type=_path(), help="Records with answers, as for training.")
@click.option(
    "--out", required=True, type=Output(folder=True), help="New folder for index.html, the pictures and numbers.json."
)
@click.option("--rows", default="0", show_default=True, help="Rows shown in detail, counted from 0: 0,5,9.")
@click.option("--decode", is_flag=True, help="Show these rows' latents in the model's own decoding too.")
@click.option("--max_new_tokens", default=256, show_default=True, type=click.IntRange(min=1), help="With --decode.")
@click.option("--most", default=1000, show_default=True, type=click.IntRange(min=1),
              help="Rows that the components and the probe are made of.")  # fmt: skip
@click.option("--latent_size", type=click.IntRange(min=1), help="k; as the model was trained if not set.")
@click.option("--batch_size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--image_root", type=_path(), help="Second place where relative image paths are looked for.")
@click.option("--processor", type=_path(), help="Folder that gives the image processor if FOLDER has none.")
@click.option("--min_pixels", type=int, help="Smallest input image; the processor's own if not set.")
@click.option("--max_pixels", type=int, help="Largest input image; the processor's own if not set.")
@click.option("--helper_min_pixels", type=int, help="As --min_pixels, for helper images.")
@click.option("--helper_max_pixels", type=int, help="As --max_pixels, for helper images.")
def inspect(
    folder: Path,
    data_path: Path,
    out: Path,
    rows: str,
    decode: bool,
    max_new_tokens: int,
    most: int,
    latent_size: int | None,
    batch_size: int,
    image_root: Path | None,
    processor: Path | None,
    **pixels: Any,
) -> None:
    """Show the latents of the model in FOLDER: what they look at, which words are near, who attends to them.

    Writes one page with pictures of the chosen rows; and over the file's rows the latents' principal components and
    what a linear probe reads from them.
    """
    from functools import partial

    from rich.progress import track

    from mirage_ds.analysis.inspect.study import inspect_file
    from mirage_ds.model.generate import Limits

    page = inspect_file(
        folder,
        data_path,
        read_rows(rows),
        out,
        image_root=image_root,
        processor=processor,
        latent_size=latent_size,
        pixels=(pixels["min_pixels"], pixels["max_pixels"]),
        helper_pixels=(pixels["helper_min_pixels"], pixels["helper_max_pixels"]),
        own=Limits(new_tokens=max_new_tokens) if decode else None,
        most=most,
        batch_size=batch_size,
        track=partial(track, description="running rows", transient=True),
    )
    click.echo(str(page))
