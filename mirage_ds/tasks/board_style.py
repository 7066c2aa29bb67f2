"""How records about boards are written, and the pictures they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.maps import Board, Cell, Ties, follow, map_hash
from mirage_ds.tasks.render import red_path, render

Answer = Literal["direct", "cot"]
Prompt = Literal["full", "short"]


@dataclass(frozen=True)
class Style:
    """How records are written; the fields are those of `BuildSpec`."""

    answer: Answer = "direct"
    prompt: Prompt = "full"
    ties: Ties = "rule"
    cell_size: int = 64


def picture_name(board: Board, cell_size: int, what: str) -> str:
    """Name a picture by its level, its map, its scale and what it shows."""
    return f"level_{len(board)}/{map_hash(board)[:16]}_{cell_size}px_{what}"


def state_picture(board: Board, cell: Cell, facing: str | None, cell_size: int) -> Picture:
    """Return the picture of the board with the agent at `cell`, facing as after the move `facing` (None: at first)."""
    what = "start" if facing is None else f"r{cell[0]}c{cell[1]}_{facing.lower()}"
    return Picture.drawn(picture_name(board, cell_size, what), lambda: render(board, cell, facing, cell_size))


def path_picture(board: Board, moves: Sequence[str], cell_size: int) -> Picture:
    """Return the picture of the board at first, with the way of `moves` in red."""
    way = hashlib.sha256("".join(moves).encode()).hexdigest()[:8]
    cells = follow(board, moves)
    return Picture.drawn(
        picture_name(board, cell_size, f"path_{way}"),
        lambda: red_path(render(board, cell_size=cell_size), cells, cell_size),
    )
