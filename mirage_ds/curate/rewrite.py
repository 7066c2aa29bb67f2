"""Records to make others of: a file of them, whose images stay where they are."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from mirage_ds.config.columns import parse_columns
from mirage_ds.curate.spec import ReadSpec
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.inside import folder_of_pictures
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import read_records
from mirage_ds.errors import UserError, shown
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.tables import suffix_of
from mirage_ds.tasks.write import Row


class Source(NamedTuple):
    """A records file to make others of."""

    file: Path
    records: list[Record]
    finder: ImageFinder

    @classmethod
    def read(cls, file: Path, spec: ReadSpec, most: int | None = None) -> Self:
        """Read a file or folder of records.

        Args:
            most: take only the first so many records.

        Raises:
            UserError: no such file, or a record among those taken that has not the format.
        """
        records = read_records(file, columns=parse_columns(spec.columns), most=most)
        return cls(file, records, ImageFinder.beside(file, spec.image_root))

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
        """Make the row that a record is already; UserError where an image is not there."""
        with self.told(record):
            return row_of(record, self.finder, folder_of_pictures())


def row_of(record: Record, finder: ImageFinder, inside: Path) -> Row:
    """Make the row that a record is already.

    Args:
        inside: where pictures lie that stood inside the records; they are written beside the new ones.

    Raises:
        RecordError: an image is not there, or cannot be decoded; or another key holds bytes.
    """

    def plain(key: str, value: Any) -> Any:
        def text(one: Any) -> str:
            if isinstance(one, bytes):
                raise record.fault(key, f"bytes ({shown(one, 20)}), which JSON cannot hold", "leave the column out")
            # Parquet has values that JSON lacks (dates).
            return str(one)

        return json.loads(json.dumps(value, default=text))

    def taken(name: str, path: str) -> Path | Picture:
        found = finder.find(record, name, path)
        # Behind a link `..` leads elsewhere; the file itself may be one.
        place = found.parent.resolve() / found.name
        if not place.is_relative_to(inside.resolve()):
            return place
        content = place.read_bytes()
        try:
            return Picture.stored(content, suffix_of(content, "that"))
        except ValueError as error:
            raise record.fault(name, f"a picture {error}", "write it as a file, and its path") from None

    inputs = tuple(taken("image_input", path) for path in record.image_input)
    helpers = tuple(taken("image_output", path) for path in record.image_output)
    extra = {key: plain(key, value) for key, value in record.extra.items()}
    return Row(record.text_input, record.text_output, inputs, helpers, extra)
