"""Records made of other records: a new file, whose images stay where they are unless they are new themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mirage_ds.curate.spec import RewriteSpec
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.report import Advance
from mirage_ds.tasks.write import Painter, new_target, whole_or_nothing

# Rows, and the pictures in them, that are held at a time.
ROWS_AT_A_TIME = 256


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
class Written:
    """What was written: the file, its rows, and how many pictures are new."""

    file: Path
    records: int
    images: int


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

    @contextmanager
    def told(self, record: Record) -> Iterator[None]:
        """Tell what is wrong with a record in a sentence that names file and line.

        Raises:
            UserError: instead of the RecordError, or of a UserError that does not know the place.
        """
        try:
            yield
        except RecordError as error:
            raise UserError(f"{self.file}, {error.fault}") from None
        except UserError as error:
            raise UserError(f"{self.file}, line {record.line}: {error}") from None

    def row(self, record: Record) -> Row:
        """Make the row that a record is already; RecordError where an image is not there."""
        inputs = tuple(self._place(record, "image_input", path) for path in record.image_input)
        helpers = tuple(self._place(record, "image_output", path) for path in record.image_output)
        return Row(record.text_input, record.text_output, inputs, helpers, dict(record.extra))

    def _place(self, record: Record, name: str, path: str) -> Path:
        place = self.finder.find(record, name, path)
        # Behind a link `..` leads elsewhere; the file itself may be one.
        return place.parent.resolve() / place.name


def write_rows(rows: Iterable[Row], spec: RewriteSpec, progress: Advance | None = None) -> Written:
    """Write `spec.out`/NAME.jsonl, and new pictures under `spec.out`/images/; paths are relative to the file.

    Args:
        rows: taken ROWS_AT_A_TIME, so that an iterator's never lie in memory together.
        progress: called with (pictures written, pictures in all; None where `rows` is an iterator).

    Raises:
        UserError: the target exists, or cannot be written.
    """
    target = new_target(spec.out, spec.name)
    out = target.parent
    total = len(_new(rows, out)) if isinstance(rows, Sequence) else None
    count = 0
    try:
        with (
            whole_or_nothing(out) as work,
            Painter(work, total, progress) as painter,
            (work / target.name).open("w", encoding="utf-8", newline="\n") as file,
        ):
            waiting = iter(rows)
            while some := list(islice(waiting, ROWS_AT_A_TIME)):
                file.writelines(line_of(row, out) for row in some)
                painter.write(_new(some, out))
                count += len(some)
    except OSError as error:
        raise UserError(f"--out {spec.out}: cannot be written ({error.strerror}); name another folder") from None
    return Written(target, count, painter.written)


def _new(rows: Sequence[Row], out: Path) -> dict[str, Picture]:
    """Return the pictures that are not there yet, by their paths in the file."""
    named = {_path(one, out): one for row in rows for one in (*row.inputs, *row.helpers) if isinstance(one, Picture)}
    return {name: one for name, one in named.items() if not (out / name).exists()}


def _path(image: Path | Picture, out: Path) -> str:
    """Return an image's path in the file."""
    return f"images/{image.name}" if isinstance(image, Picture) else Path(os.path.relpath(image, out)).as_posix()


def line_of(row: Row, out: Path) -> str:
    """Write a row as a line of a file in `out`, its images' paths relative to it."""
    record: dict[str, Any] = {"text_input": row.text_input, "text_output": row.text_output}
    for key, images in (("image_input", row.inputs), ("image_output", row.helpers)):
        paths = [_path(image, out) for image in images]
        if paths:
            record[key] = paths if len(paths) > 1 else paths[0]
    text = json.dumps(record | row.extra, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair in a key of the user's: no file can hold it, only JSON's escape.
        text = json.dumps(record | row.extra)
    return text + "\n"
