r"""Path reading: the moves of the path that is drawn on the board, as ``\boxed{RIGHT, DOWN}``.

The input is Planning's helper image, and there is no helper. It teaches a model to read paths, not to find them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mirage_ds.tasks.board_style import Style, path_picture
from mirage_ds.tasks.board_task import BoardTask
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import Board, follow, map_json, parse_board
from mirage_ds.tasks.spec import BuildSpec, ReadingSpec
from mirage_ds.tasks.vsp_planning import boxed_moves, choose_moves, kind_of, read_moves, solves

NAME = "vsp-path-reading"

_PROMPT = """
The picture shows a grid-based map on which a path is drawn in red, from the player's start to the goal. Read the path off the picture.

- The path consists of moves to an adjacent square: LEFT, RIGHT, UP or DOWN.
- Each move is one red line between the centres of two squares; its arrow-head points to where the move leads.
- Write all the moves in their order from the start to the goal, with commas between them.
- For example, your final answer should be like "RIGHT, DOWN, DOWN".

Here is the map: <image>

The final answer MUST BE put in \\boxed{}."""  # noqa: E501
_SHORT = "<image>Which moves is the red path? Answer in \\boxed{}."


@dataclass(frozen=True)
class PathReadingScore:
    """The score of one answer.

    Attributes:
        success: the moves are exactly those of the path drawn.
        valid: the moves end on the goal and meet no hole, along whichever path.
        invalid: there is no boxed answer, or no move in it.
    """

    success: bool
    valid: bool
    invalid: bool


def score(text: str, path: Any, map_desc: Any) -> PathReadingScore:
    r"""Score a generated text by its last ``\boxed{…}`` against the path drawn on the map.

    Args:
        path: the moves drawn.

    Raises:
        UserError: map_desc is no board.
    """
    board = parse_board(map_desc, "the record to score")
    moves = read_moves(last_boxed(text) or "")
    return PathReadingScore(bool(moves) and moves == path, solves(board, moves), not moves)


def readable(board: Board, moves: Sequence[str]) -> bool:
    """Tell whether moves solve the board and can be read off their picture.

    A move against the edge leaves no trace, and where a path meets itself its order cannot be seen.
    """
    cells = follow(board, moves)
    return solves(board, moves) and len(set(cells)) == len(cells)


class PathReading(BoardTask):
    """Reading of drawn paths; see the module."""

    name = NAME
    build_settings = ReadingSpec

    def prompt(self, row: Mapping[str, Any], settings: BuildSpec) -> str:
        """Return one short sentence, or the longer explanation."""
        return _PROMPT if settings.prompt == "full" else _SHORT

    def parse(self, text: str, row: Mapping[str, Any]) -> list[str] | None:
        r"""Return the moves of the last ``\boxed{…}``; None without any."""
        return read_moves(last_boxed(text) or "") or None

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a generated text for a record; the keys are those of `PathReadingScore`."""
        return asdict(score(text, record["path"], record["map_desc"]))

    def make(
        self,
        board: Board,
        rng: random.Random,
        style: Style,
        row: Mapping[str, Any] | None = None,
        wanted: str | None = None,
    ) -> Draft:
        """Make one record from a solvable board, with the path that Planning would draw.

        Args:
            row: the row the board comes from; its own path is kept when it solves the board and stands on no cell
                twice, else replaced.
            wanted: unused; answers fall into no classes.
        """
        moves, replaced = choose_moves(board, rng, style, row, readable)
        return Draft(
            text_output=boxed_moves(moves),
            images=(path_picture(board, moves, style.cell_size),),
            extra={"path": moves},
            kind=kind_of(moves),
            key=map_json(board),
            replaced=replaced,
        )
