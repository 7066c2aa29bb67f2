"""Files of records of every form that training reads → Records and faults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click

from mirage_ds.config.columns import RECOGNISED, Columns
from mirage_ds.config.mixture import Records
from mirage_ds.data.folders import find_files, paths_of
from mirage_ds.data.kinds import kind_of
from mirage_ds.data.layouts import ColumnError, roles_of
from mirage_ds.data.messages import MessageError, is_absent
from mirage_ds.data.record import Fault, Record, RecordError, make_record, name_file, parse_object
from mirage_ds.data.sources import Piece, no_record, pieces, rows_of
from mirage_ds.errors import UserError

Raw = str | dict[str, Any]
# Rows of a file by which its columns are known.
LOOKED = 1000


class Place(NamedTuple):
    """A row as it lies.

    Attributes:
        number: its line; of several files its place among all records, from 1.
        file: its number among `files`.
    """

    number: int
    file: int
    line: int
    row: Raw


def records_of_rows(
    rows: Iterable[tuple[int, Raw]], answers: bool, pictures: Path | None, columns: Columns
) -> Iterator[Record | Fault]:
    """Yield what each row holds: a Record, or the Fault of one without the format."""
    for line, row in rows:
        try:
            yield make_record(row, line, answers, pictures, columns)
        except RecordError as error:
            yield error.fault


def read_piece(piece: Piece, file: Path, pictures: Path, columns: Columns = RECOGNISED) -> Iterator[Record | Fault]:
    """Yield what each record of a piece holds: a Record, or the Fault of one without the format.

    Args:
        file: the piece's file.
        pictures: where pictures that stand inside the file are written.

    Raises:
        UserError: the file cannot be read.
    """
    return records_of_rows(rows_of(piece, file), True, pictures, columns)


def places(path: Path) -> Iterator[Place]:
    """Yield the rows of a source, as they lie; UserError where a file cannot be read."""
    files = find_files(path)
    count = 0
    for piece in pieces(files):
        for line, row in rows_of(piece, files[piece.file]):
            count += 1
            yield Place(line if len(files) == 1 else count, piece.file, line, row)


def files_of_one_folder(path: Path) -> tuple[Path, ...]:
    """List the files of a source whose images are looked for in one place; UserError where they lie in several."""
    files = find_files(path)
    if len({file.parent for file in files}) > 1:
        raise UserError(f"{path}: training reads files of several folders, this command those of one; name one folder")
    return files


def read_records(
    path: Path, answers: bool = True, columns: Columns = RECOGNISED, most: int | None = None
) -> list[Record]:
    """Read a source as `scan` does; its first fault is a UserError."""
    records, faults = scan(path, answers, columns, most)
    if faults:
        raise faults_error(path, faults, len(faults), len(records) + len(faults))
    return records


def scan(
    path: Path, answers: bool = True, columns: Columns = RECOGNISED, most: int | None = None
) -> tuple[list[Record], list[Fault]]:
    """Read a source; return the records that have the format and the faults of the others.

    Of several files a record's line is its place among all records, and its paths are from the first file's folder.

    Args:
        answers: see make_record.
        most: read only the first so many; None for all.

    Raises:
        UserError: a file is missing, cannot be read, or there is no record; or the files lie in several folders.
    """
    records: list[Record] = []
    faults: list[Fault] = []
    files = files_of_one_folder(path)
    for line in told(path, columns):
        if os.environ.get("RANK", "0") == "0":
            click.echo(line, err=True)
    for place in islice(places(path), most):
        try:
            record = make_record(place.row, place.line, answers, columns=columns)
            records.append(replace(record, line=place.number))
        except RecordError as error:
            faults.append(name_file(error.fault, files, place.file))
    if not records and not faults:
        raise no_record(path)
    return records, faults


def summary(faults: Iterable[Fault], count: int) -> tuple[str, int]:
    """Say the first fault; where others are like it, with their number and three of their lines.

    Returns:
        The sentence, and how many faults it covers.
    """
    alike: list[Fault] = []
    number = 0
    for fault in faults:
        if not alike or (fault.field, fault.what, fault.how) == (alike[0].field, alike[0].what, alike[0].how):
            number += 1
            alike += [fault] if number <= 3 else []
    first, lines = alike[0], ", ".join(str(one.line) for one in alike)
    if number == 1:
        return str(first), 1
    place = f"{first.file} lines" if first.file else "lines"
    return f"{first.field}: {first.what} in {number} of {count} records, e.g. {place} {lines}; {first.how}", number


def lists(data_path: Records) -> str:
    """Say what lists the faults of the records."""
    files = paths_of(data_path)
    commands = " and ".join(f"`mirage-ds data check {file}`" for file in files)
    return f"{commands} {'lists' if len(files) == 1 else 'list'} them"


def faults_error(data_path: Records, faults: Iterable[Fault], count: int, records: int) -> UserError:
    """Make the error that says the first of `count` faults, with what is alike, and counts the others."""
    said, alike = summary(faults, records)
    others = f"and {count - alike} more: " if count > alike else ""
    return UserError(f"{data_path}: {said}" + (f" ({others}{lists(data_path)})" if count > 1 else ""))


def told(data_path: Records, columns: Columns = RECOGNISED) -> Iterator[str]:
    """Say of each form of row in a source what its columns are taken for, unless all are named.

    The first LOOKED rows of each file of lines tell, the first row of a table: its rows have the same columns.

    Raises:
        UserError: a column that is named is not there, or it cannot be known which one is meant.
    """
    files = find_files(data_path)
    names: dict[str, None] = {}
    forms: dict[str, Path] = {}
    own = False
    for file in files:
        found, has_own = _look(str(file), (place.row for place in places(file)), columns, names)
        own |= has_own
        for form in found:
            forms.setdefault(form, file)
    if _missing(columns, names, own):
        # A column may first stand far behind in lines.
        for row in (place.row for file in files if kind_of(file) in ("lines", "array") for place in places(file)):
            with suppress(RecordError):
                names |= dict.fromkeys(_names(parse_object(row, 1) if isinstance(row, str) else row))
            if not _missing(columns, names, own):
                break
    _need_columns(str(data_path), columns, names, own)
    yield from (said_of(file, form) for form, file in forms.items())


def said_of(source: object, form: str) -> str:
    """Say for what the columns of a source are taken."""
    return f"{source}: read as {form} (--columns names others)"


def forms_of(source: str, rows: Iterable[Raw], columns: Columns) -> list[str]:
    """Return what was guessed of each form of the first rows, as --columns has it.

    Raises:
        UserError: see told.
    """
    names: dict[str, None] = {}
    forms, own = _look(source, rows, columns, names)
    _need_columns(source, columns, names, own)
    return forms


def _look(source: str, rows: Iterable[Raw], columns: Columns, names: dict[str, None]) -> tuple[list[str], bool]:
    """Return the forms, as forms_of, and whether a row is no record; add the names of all columns to `names`."""
    forms: dict[tuple[tuple[str, str], ...], None] = {}
    own = False
    for raw in islice(rows, LOOKED):
        try:
            row = parse_object(raw, 1) if isinstance(raw, str) else raw
            names |= dict.fromkeys(_names(row))
            own |= is_absent(row.get("text_input"))
            forms[tuple(roles_of(row, columns))] = None
        except ColumnError as error:
            raise UserError(f"{source}: {error}") from None
        except (MessageError, RecordError):
            continue
        if not isinstance(raw, str):
            break
    # Some columns of a form may be empty in a row.
    whole = [form for form in forms if not any({*form} < {*other} for other in forms)]
    guessed = (form for form in whole if {*form} - {*columns.named, ("messages", "messages")})
    return [_in_words(form) for form in guessed], own


def _in_words(form: tuple[tuple[str, str], ...]) -> str:
    read = ",".join(f"{role}={name}" for role, name in form if role)
    unread = ", ".join(name for role, name in form if not role)
    return f"{read}, without the pictures of {unread}" if unread else read


def _names(row: dict[str, Any]) -> list[str]:
    return [name.strip() for name in row]


def _missing(columns: Columns, names: dict[str, None], own: bool) -> list[tuple[str, str]]:
    """List (role, column) of what is named and not there; nothing of records alone where others' question is named."""
    others = not own and (columns.question or columns.messages) not in ("", "text_input")
    return [] if others or not names else [(role, name) for role, name in columns.named if name not in names]


def _need_columns(source: str, columns: Columns, names: dict[str, None], own: bool) -> None:
    for role, name in _missing(columns, names, own):
        raise UserError(f"--columns {role}={name}: {source} has no such column; it has {', '.join([*names][:20])}")
