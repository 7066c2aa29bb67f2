"""`mirage-ds data rationalize`, the command. Imports stay inside it: `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.curate.rationalize.spec import RationalizeSpec
from mirage_ds.errors import UserError

if TYPE_CHECKING:
    from mirage_ds.curate.rationalize.run import Report


@click.command(context_settings=CONTEXT)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-n", "short", type=click.IntRange(1, 1000), help="The same as --samples.")
@model_options(RationalizeSpec)
def rationalize(file: Path, short: int | None, **flags: Any) -> None:
    """Let a model write the reasoning around the helper image of each row of FILE.

    It is shown the question, its images, the helper image and the answer, and writes the text before and after the
    helper. Replies whose answer is not the row's, or that have not the form, are dropped and counted. The same command
    goes on where it was cut off.
    """
    from mirage_ds.curate.rationalize.run import rationalize as run
    from mirage_ds.tasks.report import progress_bar

    if short is not None and flags["samples"] not in (None, short):
        raise UserError(f"-n {short} and --samples {flags['samples']} say two things; give one of them")
    spec = build_model(RationalizeSpec, flags if short is None else flags | {"samples": short})
    with progress_bar("rationales: replies") as progress:
        report = run(file, spec, progress)
    _print(report, spec)
    if report.file is None:
        from mirage_ds.curate.rationalize.form import MEANINGS

        worst = report.commonest
        raise UserError(
            f"none of {sum(report.counts.values())} replies was accepted, {report.counts[worst]} of them for this: "
            f"{MEANINGS[worst]}; {spec.out}/rationalize.json has an example"
        )


def _print(report: Report, spec: RationalizeSpec) -> None:
    """Print the counts as a table on stdout."""
    from mirage_ds.curate.rationalize.form import MEANINGS
    from mirage_ds.tasks.report import print_counts

    counts: dict[str, int | str] = {"rows": report.rows, "rows with a rationale": report.written}
    counts |= {"replies": report.rows * spec.samples, "accepted": report.counts["accepted"]}
    counts |= {f"{kind}: {text}": report.counts[kind] for kind, text in MEANINGS.items() if kind in report.counts}
    counts |= {f"tokens {name}": f"{count:,}" for name, count in report.tokens.items() if count}
    print_counts(str(report.file or ""), counts.items())
