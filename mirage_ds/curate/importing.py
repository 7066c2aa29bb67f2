"""`mirage-ds data import`: rows in any form that training reads, or of the Hub, as a records file."""

from collections.abc import Iterator
from glob import has_magic
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mirage_ds.config.columns import Columns, parse_columns
from mirage_ds.curate.rewrite import row_of
from mirage_ds.curate.spec import ImportSpec
from mirage_ds.data import record_files
from mirage_ds.data.frames import rows_of_frame
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Fault, blamed
from mirage_ds.data.sources import Raw
from mirage_ds.errors import UserError, reason
from mirage_ds.tasks.write import Row, Written, new_target, write_rows


def _from_hub(source: str, split: str) -> Iterator[dict[str, Any]]:
    """Read a data set of the Hub; images stay as they were stored."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found: Any = datasets.load_dataset(source, split=split)
    except Exception as error:  # noqa: BLE001  # the Hub's client, fsspec and Arrow raise almost anything
        how = "give a file, a folder, or a data set of the Hub"
        raise UserError(f"{source}: cannot be loaded ({reason(error)}); {how}") from None
    return rows_of_frame(found)


def _open(source: str, spec: ImportSpec, columns: Columns) -> tuple[list[str], Iterator[tuple[int, Raw]], Path]:
    """Return what its rows were taken for, the rows with their numbers, and where they lie.

    Raises:
        UserError: it cannot be read.
    """
    place = Path(source)
    if place.is_dir() and (place / spec.split / "state.json").is_file():
        place /= spec.split
    # No data set of the Hub has such a name.
    if place.exists() or has_magic(source):
        beside = place if place.is_dir() else record_files.files_of_one_folder(place)[0]
        rows = ((one.number, one.row) for one in record_files.places(place))
        return list(record_files.told(place, columns)), rows, beside
    if place.suffix in (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv") or place.is_absolute():
        raise UserError(f"{source}: no such file")
    found = _from_hub(source, spec.split)
    first = list(islice(found, 8))
    return record_files.forms_of(source, first, columns), enumerate(chain(first, found), 1), place


def import_records(source: str, spec: ImportSpec) -> tuple[Written, list[str]]:
    """Write a records file of a source, as training reads it.

    Returns:
        What was written; and a sentence on each form of row, and on answers that are not learnt.

    Raises:
        UserError: the source cannot be read, a row is no record or its image is missing, the target exists.
    """
    new_target(spec)  # before the source is read
    columns = parse_columns(spec.columns, spec.layout)
    if spec.helper_key:
        columns = columns._replace(helper=(spec.helper_key,))
    forms, numbered, place = _open(source, spec, columns)
    rounds = 0
    finder = ImageFinder.beside(place, spec.image_root)

    def rows(pictures: Path) -> Iterator[Row]:
        nonlocal rounds
        count = 0
        records = record_files.records_of_rows(islice(numbered, spec.most), pictures, columns)
        for count, record in enumerate(records, 1):
            if isinstance(record, Fault):
                faults = [record, *(one if isinstance(one, Fault) else None for one in records)]
                said, _ = record_files.summary(filter(None, faults), count - 1 + len(faults))
                raise UserError(f"{source}, {said}")
            with blamed(f"{source}, "):
                row = row_of(record, finder, pictures)
            # What stood inside the row is held now.
            for path in (*record.image_input, *record.image_output):
                if Path(path).is_relative_to(pictures):
                    Path(path).unlink(missing_ok=True)
            rounds += any(turn["role"] == "assistant" for turn in record.turns_before)
            yield row
        if not count:
            raise UserError(f"{source}: holds no row")

    with TemporaryDirectory(prefix="mirage_ds_") as inside:
        written = write_rows(rows(Path(inside).resolve()), spec)
    if rounds:
        learnt = "the last is learnt, the others stand before the question"
        forms.append(f"of {rounds} record(s) with several answers {learnt}")
    return written, forms
