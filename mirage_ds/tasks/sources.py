"""What the builder reads: lines of a file, boards from JSON lines, and the maps that must not be trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError, reason, strict_json
from mirage_ds.tasks.maps import Board, map_hash, parse_board

_HASH = re.compile(r"[0-9a-f]{64}(\s+\S.*)?")


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, each with its place for messages.

    Raises:
        UserError: it cannot be read, is not UTF-8 text, or has nothing but blank lines.
    """
    found = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield line.decode().strip(), f"{path}, line {number}"
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not found:
        raise UserError(f"{path}: the file is empty; write one row a line")


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parse a line that holds a JSON object; UserError where it holds none."""
    try:
        row = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({reason(error)}); fix or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object; write one object a line")
    return row


def _board_of(row: dict[str, Any], where: str) -> Board:
    if "map_desc" not in row:
        raise UserError(f"{where}: the row has no 'map_desc'; give the board as a list of rows of 1, 2, -1 and 0")
    return parse_board(row["map_desc"], where)


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], Board, str]]:
    """Yield (row, its board, its place for messages) for each row of a JSONL file with `map_desc`.

    Raises:
        UserError: a missing, empty or broken file, a row without `map_desc`, a board that is none.
    """
    for line, where in text_lines(path):
        row = json_object(line, where)
        yield row, _board_of(row, where), where


def read_exclude(paths: Sequence[Path]) -> frozenset[str]:
    """Return the hashes of the maps in the files, each a JSONL file with `map_desc` or a list of map hashes.

    A map meets the list when one of its `symmetry_hashes` is in it.

    Raises:
        UserError: a missing or empty file, or a line that is neither.
    """
    hashes = set()
    for path in paths:
        for line, where in text_lines(path):
            if _HASH.fullmatch(line.lower()):
                hashes.add(line[:64].lower())
            elif line.startswith("{"):
                hashes.add(map_hash(_board_of(json_object(line, where), where)))
            else:
                raise UserError(
                    f"{where}: neither a record with 'map_desc' nor the SHA-256 of a map (64 hex digits); "
                    "give --exclude a JSONL file or a list of hashes"
                )
    return frozenset(hashes)
