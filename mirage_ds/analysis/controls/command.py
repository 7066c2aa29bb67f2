"""`mirage-ds controls` and `mirage-ds compare`. Imports stay inside the commands: `--help` is quick."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage_ds.analysis.controls.spec import PATH, ControlsSpec, parse_names
from mirage_ds.config.extras import need
from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.files import Output, check_output, write_atomically

if TYPE_CHECKING:
    from mirage_ds.evaluate.tables import Told


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(ControlsSpec)
def controls(folder: Path, **flags: Any) -> None:
    """Replace the latents and see whether the answers need them.

    The model in FOLDER answers each record greedily under each condition, always with the same number of slots, and
    compared with the model's own latents: paired differences of the score and of the right answer's likelihood. What
    the conditions are and what a result says is in `mirage-ds docs controls`.
    """
    run_controls(folder, build_model(ControlsSpec, flags))


def run_controls(folder: Path, spec: ControlsSpec) -> None:
    """Run the study, print its tables, and write the files asked for."""
    from mirage_ds.analysis.controls.report import told
    from mirage_ds.analysis.controls.run import study
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.progress import track
    from mirage_ds.evaluate.decoder import load_decoder
    from mirage_ds.evaluate.report import read_asked

    names = parse_names(spec.latents)
    if PATH in names:
        need("vsp", "--latents path")
    for flag, file in (("--out", spec.out), ("--markdown", spec.markdown)):
        if file:
            check_output(file, flag)
    asked = read_asked(spec, answers=True)
    finder = ImageFinder.beside(spec.data_path, spec.image_root)
    decoder = load_decoder(folder, finder, spec.processor, True, spec.pixels, spec.helper_pixels)
    found = study(decoder, names, spec, asked, partial(track, title="answering"))
    _tell(found, told(found), spec.out, spec.markdown)


def _tell(report: dict[str, Any], told: Told, out: Path | None, markdown: Path | None) -> None:
    """Print a report, and write it into the files asked for."""
    told.print()
    if out:
        write_atomically(out, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if markdown:
        write_atomically(markdown, told.markdown())


@click.command(context_settings=CONTEXT)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--metric", help="What is compared; the task's first metric if not set.")
@click.option("--seed", default=42, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Of the resamples.")
@click.option("--out", type=Output(), help="Write the comparison to this JSON file.")
@click.option("--markdown", type=Output(), help="Write the table to this Markdown file.")
def compare(files: tuple[Path, ...], metric: str | None, seed: int, out: Path | None, markdown: Path | None) -> None:
    """Compare files of scores, record by record.

    FILES are what `mirage-ds evaluate --out` wrote, samples that lmms-eval logged (.jsonl) or result tables of
    VLMEvalKit (.tsv), and each is compared with the first. Paired differences with 95 % bootstrap intervals, exact
    McNemar p and p by Holm. Files of other records are refused.
    """
    from mirage_ds.analysis.controls import report

    found = report.compare(files, metric, seed)
    _tell(found, report.compared(found), out, markdown)
