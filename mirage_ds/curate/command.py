"""`mirage-ds data vary`, `mix`, `import` and `rationalize`. Imports stay inside the commands: `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage_ds.config.columns import LAYOUTS
from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.curate.spec import KINDS, ImportSpec, Kind, MixSpec, RationalizeSpec, VarySpec
from mirage_ds.errors import UserError

if TYPE_CHECKING:
    from mirage_ds.tasks.write import Written


@click.command(context_settings=CONTEXT)
@click.argument("kind", type=click.Choice(KINDS), metavar="KIND")
@click.argument("file", type=click.Path(path_type=Path))
@model_options(VarySpec)
def vary(kind: Kind, file: Path, **flags: Any) -> None:
    """Write control variants of FILE (helper swapped, noised, as input; no image).

    \b
    KIND is one of
      helper-input   the helper is a further input image
      helper-rows    each row without its helper, then with it as an input image
      helper-text    what the helper shows, in words in the answer
      helper-swap    another record's helper, of the same level
      helper-noise   noise instead of the helper
      no-image       grey instead of every input image
      helper-only    no input image, and --question as the question
    """
    from mirage_ds.curate.vary import vary as run

    _tell(run(kind, file, build_model(VarySpec, flags)))


@click.command(context_settings=CONTEXT)
@click.argument("files", nargs=-1, required=True, metavar="FILE[:WEIGHT]...")
@model_options(MixSpec)
def mix(files: tuple[str, ...], **flags: Any) -> None:
    """Write one records file of several, shuffled into one another.

    Each is taken whole, or in proportion to its weight.
    """
    from mirage_ds.config.mixture import parse_part
    from mirage_ds.curate.mix import mix as run

    for written in run([parse_part(text) for text in files], build_model(MixSpec, flags)):
        _tell(written)


@click.command("import", context_settings=CONTEXT)
@click.argument("source", nargs=-1, required=True, metavar="SOURCE")
@model_options(ImportSpec)
def import_(source: tuple[str, ...], **flags: Any) -> None:
    """Write a records file of rows in another layout, or with columns of your own.

    SOURCE is a file (JSON lines, JSON array, CSV, Parquet, Arrow), a folder of such files, a glob pattern in quotes, a
    folder that `datasets` has saved, an image folder with its metadata, or the name of a data set of the Hub. The
    layouts of ms-swift, LLaMA-Factory and TRL are recognised, and so are columns with obvious names; --columns names
    others. If a row has what no record can hold (videos, sound, boxes, tools, rejected answers), nothing is written.
    """
    from mirage_ds.curate.importing import import_records

    # `import LAYOUT SOURCE`, as it was called before layouts were recognised.
    if len(source) == 2 and source[0].replace("_", "-") in LAYOUTS:
        flags["layout"] = source[0].replace("_", "-")
        source = source[1:]
    if len(source) > 1:
        raise UserError(f"import {' '.join(source)}: takes one source at a time; `data mix` joins what it writes")
    written, said = import_records(source[0], build_model(ImportSpec, flags))
    for line in said:
        click.echo(line)
    _tell(written)


def _tell(written: Written) -> None:
    pictures = f", {written.images} new pictures" if written.images else ""
    click.echo(f"{written.file}: {written.records} records{pictures}")


@click.command(context_settings=CONTEXT)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-n", "short", type=click.IntRange(1, 1000), help="The same as --samples.")
@model_options(RationalizeSpec)
def rationalize(file: Path, short: int | None, **flags: Any) -> None:
    """Let a model write the reasoning around each row's helper image.

    It is shown the question, its images, the helper image and the answer, and writes the text before and after the
    helper. Replies whose answer is not the row's, or that have not the form, are dropped and counted. The same command
    goes on where it was cut off.
    """
    from mirage_ds.curate.rationalize.form import MEANINGS
    from mirage_ds.curate.rationalize.run import rationalize as run
    from mirage_ds.tasks.build import print_counts

    if short is not None and flags["samples"] not in (None, short):
        raise UserError(f"-n {short} and --samples {flags['samples']} say two things; give one of them")
    spec = build_model(RationalizeSpec, flags if short is None else flags | {"samples": short})
    summary = run(file, spec)
    outcomes = summary["counts"]
    counts: dict[str, int | str] = {name: summary[name] for name in ("rows", "rows with a rationale", "replies")}
    counts |= {"accepted": outcomes["accepted"]}
    counts |= {f"{kind}: {text}": outcomes[kind] for kind, text in MEANINGS.items() if outcomes[kind]}
    counts |= {f"tokens {name}": f"{count:,}" for name, count in summary["tokens"].items() if count}
    print_counts(str(spec.out.resolve() / "data.jsonl") if outcomes["accepted"] else "", counts.items())
    if not outcomes["accepted"]:
        worst = max(MEANINGS, key=lambda kind: outcomes[kind])
        what = f"none of {summary['replies']} replies was accepted, {outcomes[worst]} of them for this"
        raise UserError(f"{what}: {MEANINGS[worst]}; {spec.out}/rationalize.json has an example")
