"""Rationales by rule: one true sentence a move, shaped like the public rows' (whose own often name wrong tiles)."""

from collections.abc import Sequence

from mirage_ds.data.messages import HELPER_MARK
from mirage_ds.tasks.maps import GOAL, HOLE, ICE, START, Board, Cell, tile

TILE_NAMES = {START: "Start", GOAL: "Target", HOLE: "Hole", ICE: "Ice"}


def spot(cell: Cell) -> str:
    """Write a cell as (row,column), counted from 0 at the top left."""
    return f"({cell[0]},{cell[1]})"


def seen(board: Board, cell: Cell) -> str:
    """Write a cell and what lies there: "[(0,2),Hole]"."""
    return f"[{spot(cell)},{TILE_NAMES[tile(board, cell)]}]"


def sentences(board: Board, cells: Sequence[Cell], moves: Sequence[str]) -> list[str]:
    """Return one sentence for each move made: from which cell, to which, and what lies there.

    Args:
        cells: what `follow` gave for `moves`: shorter than they are when a hole ends it.
    """
    told = []
    for before, after, move in zip(cells, cells[1:], moves, strict=False):
        effect = "leads to" if after != before else "has no effect at the edge of the map, so I stay at"
        told.append(f"Moving {move} from {spot(before)} {effect} {seen(board, after)}.")
    return told


def with_helper(before: Sequence[str], after: Sequence[str], boxed: str) -> str:
    """Join the sentences before and after the helper image and the answer in the public rows' shape.

    Either part without a sentence has no <think> block.
    """
    parts = ["<think> " + " ".join(part) + " </think>" if part else "" for part in (before, after)]
    return f"{parts[0]}{HELPER_MARK}{parts[1]}The answer is {boxed}."
