"""What a task module hands to the builder: one record whose pictures are not drawn yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from mirage_ds.tasks.maps import Board, Cell, Ties, map_hash
from mirage_ds.tasks.render import render

Answer = Literal["direct", "cot"]
Prompt = Literal["full", "short"]

OUTPUT_IMAGE = "<output_image>"


@dataclass(frozen=True)
class Style:
    """How records are written; the fields are those of `BuildSpec`."""

    answer: Answer = "direct"
    prompt: Prompt = "full"
    ties: Ties = "rule"
    cell_size: int = 64


@dataclass(frozen=True)
class Picture:
    """A picture and its file name without ".png"; equal names mean equal pictures, so each is drawn once."""

    name: str
    draw: Callable[[], Image.Image]


@dataclass(frozen=True)
class Draft:
    """One record to be.

    Attributes:
        kind: the class of the answer, for the report's counts.
        key: two drafts with one key are duplicates.
        extra: keys the record keeps beside the four of the format.
        replaced: the row it was made from gave an answer that is wrong.
    """

    text_input: str
    text_output: str
    image: Picture
    helper: Picture
    kind: str
    key: str
    extra: dict[str, Any] = field(default_factory=dict)
    replaced: bool = False


def picture_name(board: Board, cell_size: int, what: str) -> str:
    """Name a picture by its map, its scale and what it shows."""
    return f"{map_hash(board)[:16]}_{cell_size}px_{what}"


def state_picture(board: Board, cell: Cell, facing: str | None, cell_size: int) -> Picture:
    """Return the picture of the board with the agent at `cell`, facing as after the move `facing` (None: at first)."""
    what = "start" if facing is None else f"r{cell[0]}c{cell[1]}_{facing.lower()}"
    return Picture(picture_name(board, cell_size, what), lambda: render(board, cell, facing, cell_size))
