"""Names of several runs, shortened to what tells them apart. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def short_names(folders: Sequence[Path]) -> list[str]:
    """Leave out the folders that all paths begin and end with; one path keeps its last folder.

    runs/a/stage2 and runs/b/stage2 are "a" and "b"; runs/x and runs/x/again are "x" and "x/again".
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) == 1:
        return [one[-1] for one in parts]
    shortest = min(map(len, parts))
    begin = _common(parts, shortest)
    # What is left of the shortest path: not all of it may go.
    end = _common([one[::-1] for one in parts], shortest - begin)
    if begin + end == shortest:
        begin, end = (begin, end - 1) if end else (begin - 1, end)
    return ["/".join(one[begin : len(one) - end]) for one in parts]


def _common(parts: Sequence[Sequence[str]], most: int) -> int:
    """Count the folders that all begin with."""
    count = 0
    while count < most and len({one[count] for one in parts}) == 1:
        count += 1
    return count
