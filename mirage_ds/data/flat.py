"""Text files of records: JSON lines, JSON arrays and CSV, read as they come, never as a whole.

Each reader yields (line, first byte, byte behind it, what it holds) of each record; of an array the line is the item's
number. It takes

    content         the file; file: its name, for messages
    start, stop     where the wanted records begin and end, in bytes; first: the line of the first. All without these

and raises UserError where the file as a whole is not what it seems.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mirage_ds.data.kinds import BOM, HEAD_BYTES, Kind
from mirage_ds.errors import UserError, reason, shown

# What a reader yields; a text, or of a table a dict.
Found = Iterator[tuple[int, int, int, Any]]
READ_BYTES = 1 << 18
SEPARATORS = ",;\t"
# Of JSON, with room: two escapes of six letters make one character.
_LONGEST_WORD = 20
_GAP = re.compile(r"[\s,]*")


def json_lines(content: BinaryIO, file: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Found:
    """Read the lines that are not blank. One ends as Python's text files have it: by \\n, \\r or both.

    A byte that is not UTF-8 arrives as half a surrogate pair; record.make_record says it.
    """
    content.seek(start)
    at, line = start, first
    # What ends with \n may hold lines that end with \r.
    for block in content:
        for raw in block.splitlines(keepends=True):
            # -sig: some editors begin a UTF-8 file with a mark, which is no part of its first record.
            text = raw.decode("utf-8" if at else "utf-8-sig", "surrogateescape").rstrip("\r\n")
            begin, at = at, at + len(raw)
            if text and not text.isspace():
                yield line, begin, at, text
            if at == stop:
                return
            line += 1


def array_items(content: BinaryIO, file: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Found:
    """Read the items of a JSON array."""
    scan = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    at = start
    if not start:
        head = content.read(HEAD_BYTES)
        # Behind the array's [.
        at = len(head) - len(head.removeprefix(BOM).lstrip()) + 1
    content.seek(at)
    # `at` is where text[place] stands in the file.
    text, place, number, ended = "", 0, first, False
    while at != stop:
        opens = _GAP.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing too
        if opens < len(text) and text[opens] == "]":
            if text[opens + 1 :].strip() or content.read(READ_BYTES).strip():
                raise UserError(f"{file}: goes on after the array's closing ]; write one array, or one object a line")
            return
        closes = 0
        if opens < len(text):
            try:
                closes = scan(text, opens)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                # What is cut off by the end of the block, in a string or a word near it, is whole in the next.
                broken = isinstance(error, RecursionError) or (
                    error.pos < len(text) - _LONGEST_WORD and not error.msg.startswith("Unterminated string")
                )
                if ended or broken:
                    raise UserError(f"{file}: item {number} is not valid JSON ({reason(error)}); correct it") from None
        elif ended:
            raise UserError(f"{file}: ends before the array's closing ]; fetch or write it anew")
        if closes and (closes < len(text) or ended):
            begin = at + _bytes(text[place:opens])
            at = begin + _bytes(text[opens:closes])
            yield number, begin, at, text[opens:closes]
            number, place = number + 1, closes
            continue
        text, place = text[place:], 0
        block = content.read(max(READ_BYTES, len(text)))
        ended = not block
        text += decode(block, ended)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def table_rows(content: BinaryIO, file: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Found:
    """Read the rows of a table, as dicts; an empty value is None."""
    # A picture may stand in a table as text.
    csv.field_size_limit(sys.maxsize)
    # Whichever there are most of between the names.
    separator = max(SEPARATORS, key=content.readline().decode("utf-8", "replace").count)
    at = content.seek(0)

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
        how = "save it as CSV in UTF-8, with quotes as Excel or pandas write"
        raise UserError(f"{file}, line {line}: {what}; {how}") from None


READERS: dict[Kind, Callable[..., Found]] = {"lines": json_lines, "array": array_items, "table": table_rows}
