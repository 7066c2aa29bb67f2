"""Files of records: JSON lines and Parquet → Records and faults."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mirage_ds.data.kinds import is_parquet, need_json_lines
from mirage_ds.data.messages import is_null
from mirage_ds.data.record import Fault, Record, RecordError, make_record, parse_record
from mirage_ds.data.sources import Piece, rows_of, text_lines
from mirage_ds.errors import UserError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of each line of a file that is not blank; see text_lines.

    Raises:
        UserError: the file as a whole is something else.
    """
    need_json_lines(path)
    with path.open("rb") as file:
        yield from text_lines(file)


def _records(
    rows: Iterable[tuple[int, str | dict[str, Any]]], answers: bool, pictures: Path | None
) -> Iterator[Record | Fault]:
    for line, row in rows:
        try:
            if isinstance(row, str):
                yield parse_record(row, line, answers, pictures)
            else:
                # A row of Parquet has every column of its file: what it lacks is null there.
                own = {name: value for name, value in row.items() if not is_null(value)}
                yield make_record(own, line, answers, pictures)
        except RecordError as error:
            yield error.fault


def read_piece(piece: Piece, file: Path, pictures: Path) -> Iterator[Record | Fault]:
    """Yield what each record of a piece holds: a Record, or the Fault of one without the format.

    Args:
        file: the piece's file.
        pictures: where pictures that stand inside the file are written.

    Raises:
        UserError: the file cannot be read.
    """
    return _records(rows_of(piece, file), True, pictures)


def need_lines(path: Path) -> None:
    """Refuse a folder, Parquet and what is not there; UserError says so. The rest read_lines says."""
    if path.is_dir() or (path.is_file() and is_parquet(path)):
        raise UserError(
            f"{path}: training reads folders and Parquet, this command reads one JSON-lines file; give such a file"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file of records")


def read_records(path: Path, answers: bool = True) -> list[Record]:
    """Read a whole file as `scan` does; its first fault is a UserError."""
    records, faults = scan(path, answers)
    if faults:
        raise UserError(f"{path}: {faults[0]}; `mirage-ds data check {path}` lists all faults")
    return records


def scan(path: Path, answers: bool = True) -> tuple[list[Record], list[Fault]]:
    """Read a whole file; return the records that have the format and the faults of the others.

    Args:
        answers: see parse_record.

    Raises:
        UserError: the file is missing, cannot be read, or holds no record.
    """
    records: list[Record] = []
    faults: list[Fault] = []
    try:
        need_lines(path)
        for found in _records(read_lines(path), answers, None):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                records.append(found)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a readable file of records") from None
    if not records and not faults:
        raise UserError(f"{path}: holds no record; expected one JSON object a line")
    return records, faults
