"""`mirage-ds data import`: conversations in another trainer's layout, from a file or the Hub, as a records file."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mirage_ds.curate.layouts import Layout, read_row
from mirage_ds.curate.rewrite import place_of
from mirage_ds.curate.spec import ImportSpec
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.inside import content_of
from mirage_ds.data.kinds import is_array, is_arrow, is_parquet
from mirage_ds.data.messages import TURNS_BEFORE, MessageError
from mirage_ds.data.progress import Advance
from mirage_ds.data.record import Fault, RecordError, make_record
from mirage_ds.data.sources import BATCH_ROWS
from mirage_ds.errors import UserError, reason, strict_json
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.tables import read_batches, read_objects, reading, suffix_of
from mirage_ds.tasks.write import Row, Written, new_target, write_rows


def _from_array(file: Path) -> Iterable[Any]:
    try:
        values: list[Any] = strict_json(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({reason(error)}); expected a list of rows") from None
    return values


def _from_hub(source: str, split: str) -> Iterable[Any]:
    """Read a data set of the Hub; images stay as they were stored."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found: Any = datasets.load_dataset(source, split=split)
    except Exception as error:  # noqa: BLE001  # the Hub's client, fsspec and Arrow raise almost anything
        raise UserError(
            f"{source}: cannot be loaded ({reason(error)}); give a file, or a data set of the Hub"
        ) from None
    # As Arrow has them: images would be decoded otherwise.
    return (row for part in found.with_format("arrow").iter(BATCH_ROWS) for row in part.to_pylist())


def read_source(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """Read (number from 1, row) of JSON lines, a JSON array, Parquet, Arrow or a data set of the Hub.

    Raises:
        UserError: it cannot be read.
    """
    file = Path(source)
    with reading(file):
        if not file.is_file():
            if file.suffix in (".json", ".jsonl", ".parquet", ".arrow", ".csv") or file.is_absolute():
                raise UserError(f"{source}: no such file")
            return enumerate(_from_hub(source, split), 1)
        if is_parquet(file) or is_arrow(file):
            return enumerate((row for batch in read_batches(file) for row in batch.to_pylist()), 1)
        return enumerate(_from_array(file), 1) if is_array(file) else read_objects(file)


def _picture(value: Any) -> Picture | None:
    """Return a picture that stands in the row itself; ValueError where it cannot be decoded."""
    content = content_of(value)
    return None if content is None else Picture.stored(content, suffix_of(content, "that"))


def _row(number: int, values: Any, layout: Layout, helper_key: str, finder: ImageFinder) -> Row:
    if not isinstance(values, Mapping):
        raise RecordError(Fault(number, "row", f"expected an object, found {type(values).__name__}", "write one"))
    try:
        made = read_row(values, layout, helper_key)
    except MessageError as error:
        raise RecordError(Fault(number, error.field, error.what, error.how)) from None
    given: dict[str, list[Any]] = {}
    for name in ("image_input", "image_output"):
        try:
            given[name] = [_picture(value) or value for value in made.get(name, ())]
        except ValueError as error:
            raise RecordError(Fault(number, name, f"a picture {error}", "write it as a file, and its path")) from None
    # Checked as a record with a path for each image, wherever it comes from.
    named = {name: [value if isinstance(value, str) else "inside" for value in own] for name, own in given.items()}
    record = make_record(made | named, number)
    inputs, helpers = (
        tuple(one if isinstance(one, Picture) else place_of(record, name, str(one), finder) for one in own)
        for name, own in given.items()
    )
    # A data set may hold dates and the like, which JSON has not.
    extra = json.loads(json.dumps(dict(record.extra), default=str))
    return Row(record.text_input, record.text_output, inputs, helpers, extra)


def import_records(
    layout: Layout, source: str, spec: ImportSpec, progress: Advance | None = None
) -> tuple[Written, int]:
    """Write a records file of a source.

    Returns:
        What was written, and how many rows have answers before the last, which are not learnt.

    Raises:
        UserError: the source cannot be read, a row has not the layout or its image is missing, the target exists.
    """
    new_target(spec)  # before the source is read
    finder = ImageFinder.beside(Path(source), spec.image_root)
    helped = rounds = 0

    def rows() -> Iterator[Row]:
        nonlocal helped, rounds
        number = 0
        for number, values in islice(read_source(source, spec.split), spec.most):
            try:
                row = _row(number, values, layout, spec.helper_key, finder)
            except RecordError as error:
                raise UserError(f"{source}, {error.fault}") from None
            helped += bool(row.helpers)
            rounds += any(turn["role"] == "assistant" for turn in row.extra.get(TURNS_BEFORE, ()))
            yield row
        if not number:
            raise UserError(f"{source}: holds no row")
        if not helped and spec.helper_key != ImportSpec.model_fields["helper_key"].default:
            raise UserError(f"--helper_key {spec.helper_key}: no row of {source} has it; check the name")

    return write_rows(rows(), spec, progress), rounds
