"""`mirage-ds controls` and `mirage-ds compare`. Imports stay inside the commands: `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirage_ds.analysis.controls.names import CONDITIONS, parse_names
from mirage_ds.config.flags import CONTEXT
from mirage_ds.files import Output

if TYPE_CHECKING:
    from mirage_ds.analysis.controls.study import Wanted
    from mirage_ds.evaluate.decoder import Decoder
    from mirage_ds.model.generate import Limits

_PATH = click.Path(path_type=Path)
_SEED = click.IntRange(min=0, max=2**31 - 1)


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=_PATH)
@click.option("--data_path", required=True, type=_PATH, help="Records with answers and latent runs.")
@click.option(
    "--latents",
    default=",".join(CONDITIONS),
    show_default=True,
    help="What is fed at the slots, compared with own; path: the latents of one path or of another.",
)
@click.option("--task", help="Whose scorer is used; the records' own task if they name one.")
@click.option("--image_root", type=_PATH, help="Second place where relative image paths are looked for.")
@click.option("--processor", type=_PATH, help="Folder that gives the image processor if FOLDER has none.")
@click.option("--run_length", default="trained", show_default=True, help="Slots of every run: as trained, or a number.")
@click.option("--max_new_tokens", default=1024, show_default=True, type=click.IntRange(min=1))
@click.option("--batch_size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--most", type=click.IntRange(min=1), help="Take only the first so many records.")
@click.option("--min_pixels", type=int, help="Smallest input image; the processor's own if not set.")
@click.option("--max_pixels", type=int, help="Largest input image; the processor's own if not set.")
@click.option("--helper_min_pixels", type=int, help="Smallest helper image, as it was trained with.")
@click.option("--helper_max_pixels", type=int, help="Largest helper image, as it was trained with.")
@click.option("--seed", default=42, show_default=True, type=_SEED, help="Of vectors, partners, paths and resamples.")
@click.option("--out", type=Output(), help="Write everything, each record's answers too, to this JSON file.")
@click.option("--markdown", type=Output(), help="Write the tables to this Markdown file.")
def controls(
    folder: Path,
    data_path: Path,
    latents: str,
    task: str | None,
    image_root: Path | None,
    processor: Path | None,
    run_length: str,
    max_new_tokens: int,
    batch_size: int,
    most: int | None,
    min_pixels: int | None,
    max_pixels: int | None,
    helper_min_pixels: int | None,
    helper_max_pixels: int | None,
    seed: int,
    out: Path | None,
    markdown: Path | None,
) -> None:
    """Replace the latents of the model in FOLDER and see whether its answers change.

    Each record is answered greedily under each condition, always with the same number of slots, and compared with the
    model's own latents: paired differences of the score and of the right answer's likelihood. What the conditions are
    and what a result says stands in docs/controls.md.
    """
    from mirage_ds.analysis.controls.study import Wanted
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.evaluate.decoder import load_decoder, run_limits

    wanted = Wanted(parse_names(latents), task, most, seed, batch_size, (helper_min_pixels, helper_max_pixels))
    decoder = load_decoder(
        folder, ImageFinder.beside(data_path, image_root), processor, pixels=(min_pixels, max_pixels)
    )
    # With a fixed number of slots the longest run has no say.
    run_controls(
        decoder, data_path, processor, run_limits(decoder, max_new_tokens, 0, run_length), wanted, out, markdown
    )


def run_controls(
    decoder: Decoder,
    data_path: Path,
    processor: Path | None,
    limits: Limits,
    wanted: Wanted,
    out: Path | None,
    markdown: Path | None = None,
) -> None:
    """Run the study, print its tables, and write the files asked for."""
    from functools import partial

    from rich.progress import track

    from mirage_ds.analysis.controls import report as reports
    from mirage_ds.analysis.controls.study import study
    from mirage_ds.files import write_atomically

    found = study(
        decoder, data_path, processor, limits, wanted, partial(track, description="answering", transient=True)
    )
    reports.print_tables(found)
    if out:
        reports.write_json(found, out)
    if markdown:
        write_atomically(markdown, reports.markdown(found))


@click.command(context_settings=CONTEXT)
@click.argument("files", nargs=-1, required=True, type=_PATH)
@click.option("--metric", help="What is compared; the task's first metric if not set.")
@click.option("--seed", default=42, show_default=True, type=_SEED, help="Of the resamples.")
@click.option("--out", type=Output(), help="Write the comparison to this JSON file.")
@click.option("--markdown", type=Output(), help="Write the table to this Markdown file.")
def compare(files: tuple[Path, ...], metric: str | None, seed: int, out: Path | None, markdown: Path | None) -> None:
    """Compare FILES that `mirage-ds evaluate --out` wrote, each with the first, record by record.

    Paired differences with 95 % bootstrap intervals, exact McNemar p and p by Holm. Files of other records are refused.
    """
    import json

    from mirage_ds.analysis.controls import compare as comparing
    from mirage_ds.files import write_atomically

    found = comparing.compare(files, metric, seed)
    comparing.print_comparison(found)
    if out:
        write_atomically(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if markdown:
        write_atomically(markdown, comparing.comparison_markdown(found))
