"""What the builder reads: boards from a JSONL file, and the maps that must not be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.maps import Board, map_hash, parse_board

_HASH = re.compile(r"[0-9a-f]{64}(\s+\S.*)?")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, each with its place for messages.

    Raises:
        UserError: no such file, not UTF-8 text, or nothing but blank lines.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text at byte {error.start}; give a JSONL file or a list of hashes"
        ) from None
    found = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found = True
            yield line.strip(), f"{path}, line {number}"
    if not found:
        raise UserError(f"{path}: the file is empty; give one map a line")


def _parse_row(line: str, where: str) -> tuple[dict[str, Any], Board]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: broken JSON at column {error.colno} ({error.msg}); mend or remove the line"
        ) from None
    if not isinstance(row, dict) or "map_desc" not in row:
        raise UserError(f"{where}: the row has no 'map_desc'; give the board as a list of rows of 1, 2, -1 and 0")
    return row, parse_board(row["map_desc"], where)


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], Board, str]]:
    """Yield (row, its board, its place for messages) for each row of a JSONL file with `map_desc`.

    Raises:
        UserError: a missing, empty or broken file, a row without `map_desc`, a board that is none.
    """
    for line, where in _lines(path):
        yield (*_parse_row(line, where), where)


def read_exclude(paths: Sequence[Path]) -> frozenset[str]:
    """Return the hashes of the maps in the files, each a JSONL file with `map_desc` or a list of map hashes.

    A map meets the list when one of its `symmetry_hashes` is in it.

    Raises:
        UserError: a missing or empty file, or a line that is neither.
    """
    hashes = set()
    for path in paths:
        for line, where in _lines(path):
            if _HASH.fullmatch(line.lower()):
                hashes.add(line[:64].lower())
            elif line.startswith("{"):
                hashes.add(map_hash(_parse_row(line, where)[1]))
            else:
                raise UserError(
                    f"{where}: neither a record with 'map_desc' nor the SHA-256 of a map (64 hex digits); "
                    "give --exclude a JSONL file or a list of hashes"
                )
    return frozenset(hashes)
