"""Records to make others of: a file of them, whose images stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record, RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.tasks.write import Row


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
        if faults and (most is None or len(records) < most or faults[0].line < records[most - 1].line):
            raise UserError(f"{file}, {faults[0]}")
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
        """Make the row that a record is already; UserError where an image is not there."""
        with self.told(record):
            inputs = tuple(place_of(record, "image_input", path, self.finder) for path in record.image_input)
            helpers = tuple(place_of(record, "image_output", path, self.finder) for path in record.image_output)
        return Row(record.text_input, record.text_output, inputs, helpers, dict(record.extra))


def place_of(record: Record, name: str, path: str, finder: ImageFinder) -> Path:
    """Return where an image of a record lies; RecordError where it is not there."""
    place = finder.find(record, name, path)
    # Behind a link `..` leads elsewhere; the file itself may be one.
    return place.parent.resolve() / place.name
