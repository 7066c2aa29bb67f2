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
from mirage_ds.errors import UserError, reason, shown

READ_BYTES = 1 << 18
SEPARATORS = ",;\t"
# Of JSON, with room: two escapes of six letters make one character.
_LONGEST_WORD = 20
_GAP = re.compile(r"[\s,]*")


def array_items(content: BinaryIO, file: Path, first: int = 1) -> Iterator[tuple[int, int, int, str]]:
    """Yield (number, first byte, byte behind it, text) of each item of a JSON array.

    Args:
        content: the array.
        file: its name, for messages.
        first: number of the first item.

    Raises:
        UserError: an item is no JSON, or the array does not end.
    """
    scan = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    block = content.read(READ_BYTES)
    # What text[place] is the character of: the array's [ is behind it.
    at = len(block) - len(block.removeprefix(BOM).lstrip()) + 1
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
                # What is cut off by the end of the block, in a string or a word near it, is whole in the next.
                broken = isinstance(error, RecursionError) or (
                    error.pos < len(text) - _LONGEST_WORD and not error.msg.startswith("Unterminated string")
                )
                if ended or broken:
                    raise UserError(f"{file}: item {number} is not valid JSON ({reason(error)}); correct it") from None
        elif ended:
            raise UserError(f"{file}: ends before the array's closing ]; fetch or write it anew")
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


def table_rows(
    content: BinaryIO, file: Path, start: int = 0, stop: int | None = None, first: int = 0
) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Yield (line, first byte, byte behind it, values) of each row of a table; an empty value is None.

    Args:
        content: the table; file: its name, for messages.
        start, stop: where the wanted rows begin and end, in bytes, and first: the line of the first; all without these.

    Raises:
        UserError: a row has another number of values than there are names, a name stands twice, or quotes do not fit.
    """
    # A picture may stand in a table as text.
    csv.field_size_limit(sys.maxsize)
    separator = _separator(content)
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for line in content:
            at += len(line)
            yield line.decode("utf-8-sig" if at == len(line) else "utf-8")

    rows = csv.reader(lines(), delimiter=separator, strict=True)
    names: list[str] = []
    begin, line, skipped = 0, 1, 0
    try:
        for values in rows:
            if values and not names:
                names = values
                if twice := next((name for name in names if name and names.count(name) > 1), None):
                    raise UserError(f"{file}: has two columns {shown(twice)}; rename one")
                if start:
                    at, skipped = content.seek(start), first - 1 - rows.line_num
            elif values:
                if len(values) != len(names):
                    how = "put a value that holds a separator into quotes"
                    raise UserError(f"{file}, line {line}: {len(values)} values for {len(names)} columns; {how}")
                yield line, begin, at, {name: value or None for name, value in zip(names, values, strict=True) if name}
            if at == stop:
                return
            begin, line = at, skipped + rows.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"no table ({reason(error)})"
        raise UserError(
            f"{file}, line {line}: {what}; save it as CSV in UTF-8, with quotes as Excel or pandas write"
        ) from None


def _separator(content: BinaryIO) -> str:
    """Return what stands between a table's names: a comma, a semicolon or a tab, whichever there are most of."""
    names = content.readline().decode("utf-8", "replace")
    content.seek(0)
    return max(SEPARATORS, key=names.count)
