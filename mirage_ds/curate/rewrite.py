"""Records made of other records: a new file, whose images stay where they are unless they are new themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.curate.spec import RewriteSpec
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError, shown
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.report import Advance
from mirage_ds.tasks.write import Written, image_keys, new_pictures, write_records


@dataclass(frozen=True)
class Row:
    """A record to be.

    Attributes:
        inputs, helpers: images, each a file there is, or a picture that is to be written.
        extra: keys beside the four of the format.
    """

    text_input: str
    text_output: str
    inputs: tuple[Path | Picture, ...]
    helpers: tuple[Path | Picture, ...]
    extra: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A records file to make others of."""

    file: Path
    records: list[Record]
    finder: ImageFinder

    @classmethod
    def read(cls, file: Path, image_root: Path | None, most: int | None = None) -> Source:
        """Read a JSON-lines file.

        Args:
            most: take only the first so many records.

        Raises:
            UserError: no such file, or a record among those taken that has not the format.
        """
        records, faults = scan(file)
        last = records[most - 1].line if most and most <= len(records) else None
        for fault in faults:
            if last is None or fault.line < last:
                raise UserError(f"{file}, {fault}")
        return cls(file, records[:most], ImageFinder.beside(file, image_root))

    def told(self, record: Record) -> AbstractContextManager[None]:
        """Tell what is wrong with a record of this file; see `told`."""
        return told(self.file, record.line)

    def row(self, record: Record) -> Row:
        """Make the row that a record is already; RecordError where an image is not there."""
        return row_of(record, self.finder)


@contextmanager
def told(file: Path, line: int) -> Iterator[None]:
    """Tell what is wrong with a record in a sentence that names file and line.

    Raises:
        UserError: instead of the RecordError, or of a UserError that does not know the place.
    """
    try:
        yield
    except RecordError as error:
        raise UserError(f"{file}, {error.fault}") from None
    except UserError as error:
        raise UserError(f"{file}, line {line}: {error}") from None


def named_task(record: Record, given: str | None) -> str | None:
    """Return the task that --task names, else the record's own; None where neither does.

    Raises:
        RecordError: the record's is no name, or is code.
    """
    name = given or record.extra.get("task")
    if name is not None and not isinstance(name, str):
        raise record.fault("task", f"expected a name, found {shown(name)}", "write it as a string, or give --task")
    if name and ":" in name and not given:
        raise record.fault("task", f"{shown(name)} is code, which data must not choose", "give it with --task")
    return name


def row_of(record: Record, finder: ImageFinder) -> Row:
    """Make the row that a record is already; RecordError where an image is not there."""
    inputs = tuple(place_of(record, "image_input", path, finder) for path in record.image_input)
    helpers = tuple(place_of(record, "image_output", path, finder) for path in record.image_output)
    return Row(record.text_input, record.text_output, inputs, helpers, dict(record.extra))


def place_of(record: Record, name: str, path: str, finder: ImageFinder) -> Path:
    """Return where an image of a record lies; RecordError where it is not there."""
    place = finder.find(record, name, path)
    # Behind a link `..` leads elsewhere; the file itself may be one.
    return place.parent.resolve() / place.name


def write_rows(rows: Iterable[Row], spec: RewriteSpec, progress: Advance | None = None) -> Written:
    """Write `spec.out`/NAME.jsonl, and new pictures under `spec.out`/images/; paths are relative to the file.

    Args:
        progress: called with (pictures written, pictures in all; None where `rows` is an iterator).

    Raises:
        UserError: the target exists, or cannot be written.
    """
    out = spec.out.resolve()
    total = len(new_pictures(out, map(_pictures, rows))) if isinstance(rows, Sequence) else None
    lines = ((line_of(row, out), _pictures(row)) for row in rows)
    return write_records(spec.out, spec.name, lines, total, progress)


def _pictures(row: Row) -> dict[str, Picture]:
    """Return the pictures that are to be written, by their paths in the file."""
    return {f"images/{one.name}": one for one in (*row.inputs, *row.helpers) if isinstance(one, Picture)}


def _path(image: Path | Picture, out: Path) -> str:
    """Return an image's path in the file."""
    return f"images/{image.name}" if isinstance(image, Picture) else Path(os.path.relpath(image, out)).as_posix()


def line_of(row: Row, out: Path) -> str:
    """Write a row as a line of a file in `out`, its images' paths relative to it."""
    inputs, helpers = ([_path(image, out) for image in images] for images in (row.inputs, row.helpers))
    record = {"text_input": row.text_input, "text_output": row.text_output, **image_keys(inputs, helpers), **row.extra}
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair in a key of the user's: no file can hold it, only JSON's escape.
        text = json.dumps(record)
    return text + "\n"
