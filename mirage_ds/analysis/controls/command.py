"""`mirage-ds controls` and `mirage-ds compare`. Imports stay inside the commands: `--help` is quick."""

from pathlib import Path
from typing import Any

import click

from mirage_ds.analysis.controls.spec import ControlsSpec
from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.files import Output


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(ControlsSpec)
def controls(folder: Path, **flags: Any) -> None:
    """Replace the latents and see whether the answers need them.

    The model in FOLDER answers each record greedily under each condition, with the same number of slots (off: none).
    Reported: paired differences from its own latents, of the score and of the right answer's likelihood.
    `mirage-ds docs controls` says what a result means.

    \b
    A condition says what is fed at the slots:
      own       the model's own states
      first     the state before the block, at every slot
      zero      zeros
      random    random directions, as long as own latents
      matched   normal vectors with own latents' mean and covariance
      swap      another record's own latents
      oracle    the helper image's features, as in stage 1; with --latent_targets learned ones
      off       nothing: there is no block
      text      the embedding of <|latent_pad|>
      path      planning maps: features of a helper with the record's path, then with another
    """
    from mirage_ds.analysis.controls.run import run_controls

    run_controls(folder, build_model(ControlsSpec, flags))


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
    report.tell(found, report.compared(found), out, markdown)
