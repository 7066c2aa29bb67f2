"""Text files in which a record does not end with its line: JSON arrays and CSV, read as they come, never as a whole."""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mirage_ds.data.kinds import BOM
from mirage_ds.errors import UserError, reason

READ_BYTES = 1 << 18
SEPARATORS = ",;\t"
_GAP = re.compile(r"[\s,]*")


def array_items(
    content: BinaryIO, file: Path, first: int = 1, whole: bool = True
) -> Iterator[tuple[int, int, int, str]]:
    """Yield (number, first byte, byte behind it, text) of each item of a JSON array.

    Args:
        content: the whole array, or from one item to another.
        file: its name, for messages.
        first: number of the first item.

    Raises:
        UserError: an item is no JSON, or the array does not end.
    """
    scan = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    block = content.read(READ_BYTES)
    # What text[place] is the character of.
    at = len(block) - len(block.removeprefix(BOM).lstrip()) + 1 if whole else 0
    text, place, number, ended = decode(block[at:]), 0, first, False
    while True:
        start = _GAP.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing too
        if start < len(text) and text[start] == "]":
            if text[start + 1 :].strip() or content.read(READ_BYTES).strip():
                raise UserError(f"{file}: goes on after the array's closing ]; write one array, or one object a line")
            return
        stop = 0
        if start < len(text):
            try:
                stop = scan(text, start)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                # What is cut off by the end of the block is whole in the next.
                if ended or isinstance(error, RecursionError):
                    raise UserError(f"{file}: item {number} is not valid JSON ({reason(error)}); correct it") from None
        elif ended:
            if whole:
                raise UserError(f"{file}: ends before the array's closing ]; fetch or write it anew")
            return
        if stop and (stop < len(text) or ended):
            begin = at + _bytes(text[place:start])
            at = begin + _bytes(text[start:stop])
            yield number, begin, at, text[start:stop]
            number, place = number + 1, stop
            continue
        text, place = text[place:], 0
        block = content.read(max(READ_BYTES, len(text)))
        ended = not block
        text += decode(block, ended)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def header_of(file: Path) -> list[str]:
    """Return the names of a table's columns; UserError where one stands twice."""
    with file.open("rb") as content:
        return next(_values(content, file, 1))[2]


def table_rows(
    content: BinaryIO, file: Path, first: int = 1, names: list[str] | None = None
) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Yield (line, first byte, byte behind it, values) of each row of a table; an empty value is None.

    Args:
        content: the whole table, or rows of it: then with its names.
        first: number of the first line.

    Raises:
        UserError: a row has another number of values than there are names, or quotes that do not fit.
    """
    begin = 0
    for line, stop, values in _values(content, file, first):
        if names is None:
            names = values
        elif len(values) != len(names):
            how = "put a value that holds a separator into quotes"
            raise UserError(f"{file}, line {line}: {len(values)} values for {len(names)} columns; {how}")
        else:
            row = {name: value or None for name, value in zip(names, values, strict=True) if name}
            yield line, begin, stop, row
        begin = stop


def _values(content: BinaryIO, file: Path, first: int) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (line, byte behind it, values) of each row that is not blank."""
    # A picture may stand in a table as text.
    csv.field_size_limit(sys.maxsize)
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for line in content:
            at += len(line)
            yield line.decode("utf-8-sig" if first == 1 and at == len(line) else "utf-8")

    separator = separator_of(file)
    rows = csv.reader(lines(), delimiter=separator, strict=True)
    line = first
    try:
        for values in rows:
            if values:
                yield line, at, values
            line = first + rows.line_num
    except (csv.Error, UnicodeDecodeError) as error:
        what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"no table ({reason(error)})"
        raise UserError(
            f"{file}, line {line}: {what}; save it as CSV in UTF-8, with quotes as Excel or pandas write"
        ) from None


def separator_of(file: Path) -> str:
    """Return what stands between a table's names: a comma, a semicolon or a tab, whichever there are most of."""
    with file.open("rb") as content:
        names = content.readline().decode("utf-8", "replace")
    return max(SEPARATORS, key=names.count)
