r"""Path reading: the moves of the path that is drawn on the board, as ``\boxed{RIGHT, DOWN}``.

The input is Planning's helper image, and there is no helper. It teaches a model to read paths, not to find them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_ds.tasks.board_task import Given
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import Board, follow, map_json, parse_board
from mirage_ds.tasks.render import path_picture
from mirage_ds.tasks.spec import ReadingSpec
from mirage_ds.tasks.vsp_planning import MovesTask, boxed_moves, choose_moves, kind_of, solves


def readable(board: Board, moves: Sequence[str]) -> bool:
    """Tell whether moves solve the board and can be read off their picture.

    A move against the edge leaves no trace, and where a path meets itself its order cannot be seen.
    """
    cells = follow(board, moves)
    return solves(board, moves) and len(set(cells)) == len(cells)


class PathReading(MovesTask):
    """Reading of drawn paths; see the module."""

    name = "vsp-path-reading"
    short = "<image>Which moves is the red path? Answer in \\boxed{}."
    build_settings = ReadingSpec

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a text by the path that is drawn on the record's map.

        success: the moves are exactly those of the path. valid: they end on the goal and meet no hole, along whichever
        path. invalid: there is no boxed answer, or no move in it.

        Raises:
            UserError: map_desc is no board.
        """
        path, board = record["path"], parse_board(record["map_desc"], "the record to score")
        moves = self.parse(text, record) or []
        return {"success": bool(moves) and moves == path, "valid": solves(board, moves), "invalid": not moves}

    def make(self, given: Given) -> Draft:
        """Make one record, with the path that Planning would draw.

        The row's own path is kept when it solves the board and stands on no cell twice, else replaced.
        """
        moves, replaced = choose_moves(given, readable)
        return Draft(
            text_output=boxed_moves(moves),
            images=(path_picture(given.board, moves, given.settings.cell_size),),
            extra={"path": moves},
            kind=kind_of(moves),
            key=map_json(given.board),
            replaced=replaced,
        )
