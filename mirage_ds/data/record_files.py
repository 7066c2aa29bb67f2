"""Files of records of every form that training reads → Records and faults."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import click

from mirage_ds.config.columns import RECOGNISED, Columns
from mirage_ds.config.mixture import Records
from mirage_ds.data.folders import find_files, paths_of
from mirage_ds.data.layouts import ColumnError, read_row
from mirage_ds.data.messages import MessageError, is_absent
from mirage_ds.data.record import Fault, Record, RecordError, make_record, name_file, parse_object
from mirage_ds.data.sources import Piece, Raw, no_record, pieces, rows_of
from mirage_ds.errors import UserError

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


def records_of_rows(rows: Iterable[tuple[int, Raw]], pictures: Path, columns: Columns) -> Iterator[Record | Fault]:
    """Yield what each row holds: a Record, or the Fault of one without the format."""
    for line, row in rows:
        try:
            yield make_record(row, line, pictures=pictures, columns=columns)
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
    return records_of_rows(rows_of(piece, file), pictures, columns)


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
            records.append(replace(make_record(place.row, place.line, answers, columns=columns), line=place.number))
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
    look = _Look(columns)
    # A named column may first stand far behind.
    for whole in (False, True):
        for file in files:
            if not whole or look.missing():
                look.see(file, (place.row for place in places(file)), whole)
    look.need_columns(data_path)
    yield from look.said()


def forms_of(source: str, rows: Iterable[Raw], columns: Columns) -> list[str]:
    """Say it of the first rows of a source; see told."""
    look = _Look(columns)
    look.see(source, rows)
    look.need_columns(source)
    return look.said()


class _Look:
    """What rows have been taken for.

    Attributes:
        forms: how columns were guessed, as --columns has it → the source whose rows were the first.
        names: of all columns.
        own: whether a row is no record.
    """

    def __init__(self, columns: Columns):
        self.columns = columns
        self.forms: dict[str, object] = {}
        self.names: dict[str, None] = {}
        self.own = False

    def see(self, source: object, rows: Iterable[Raw], whole: bool = False) -> None:
        """Look at the first rows; with `whole` at the names of further ones too while a named column is missing.

        Raises:
            UserError: it cannot be known which column is meant.
        """
        forms: dict[tuple[tuple[str, str], ...], None] = {}
        for number, raw in enumerate(rows):
            if number >= LOOKED and not (whole and self.missing()):
                break
            try:
                row = parse_object(raw, 1) if isinstance(raw, str) else raw
                self.names |= dict.fromkeys(name.strip() for name in row)
                if number >= LOOKED:
                    # For its names alone: what else is wrong with it is its own fault, as with every other row.
                    continue
                self.own |= is_absent(row.get("text_input"))
                forms[tuple(read_row(row, self.columns, answers=False)[1])] = None
            except ColumnError as error:
                raise UserError(f"{source}: {error}") from None
            except (MessageError, RecordError):
                continue
            if not isinstance(raw, str):
                break
        for form in forms:
            # Some columns of a form may be empty in a row.
            part = any({*form} < {*other} for other in forms)
            if not part and {*form} - {*self.columns.named, ("messages", "messages")}:
                self.forms.setdefault(_in_words(form), source)

    def said(self) -> list[str]:
        """Say for what the columns are taken."""
        return [f"{source}: read as {form} (--columns names others)" for form, source in self.forms.items()]

    def missing(self) -> list[tuple[str, str]]:
        """List (role, column) of what is named and not there; none of records alone where others' question is named."""
        others = not self.own and (self.columns.question or self.columns.messages) not in ("", "text_input")
        return [] if others or not self.names else [one for one in self.columns.named if one[1] not in self.names]

    def need_columns(self, source: object) -> None:
        """UserError where a column that is named is missing."""
        for role, name in self.missing():
            has = ", ".join([*self.names][:20])
            raise UserError(f"--columns {role}={name}: {source} has no such column; it has {has}")


def _in_words(form: tuple[tuple[str, str], ...]) -> str:
    read = ",".join(f"{role}={name}" for role, name in form if role)
    unread = ", ".join(name for role, name in form if not role)
    return f"{read}, without the pictures of {unread}" if unread else read
