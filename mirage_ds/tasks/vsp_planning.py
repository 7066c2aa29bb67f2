r"""VSP spatial planning: the shortest safe way from start to goal, as ``\boxed{RIGHT, DOWN}``.

The helper image is the start map with the answer's own path in red, never another path of the same length.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.board_task import BoardTask, Given
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import GOAL, HOLE, MOVES, Board, find, follow, parse_board, shortest_path, tile
from mirage_ds.tasks.rationale import sentences, spot, with_helper
from mirage_ds.tasks.render import path_picture, state_picture

NAME = "vsp-spatial-planning"

_LETTERS = {move[0]: move for move in MOVES}


def read_moves(boxed: str) -> list[str]:
    """Return the moves of an answer: the letters U, D, L, R of the upper-cased string ("RIGHT" holds but one)."""
    return [_LETTERS[letter] for letter in boxed.upper() if letter in _LETTERS]


def solves(board: Board, moves: Sequence[str]) -> bool:
    """Tell whether the moves end on the goal without meeting a hole; off-grid moves stay put."""
    cells = follow(board, moves)
    return tile(board, cells[-1]) == GOAL and all(tile(board, cell) != HOLE for cell in cells)


def _given_moves(row: Mapping[str, Any]) -> list[str]:
    """Return the moves a row brings along, in its answer or else in its `path`, a list; none without either."""
    boxed = last_boxed(str(row.get("text_output") or ""))
    path = row.get("path")
    return read_moves(boxed if boxed is not None else " ".join(map(str, path if isinstance(path, list) else ())))


def choose_moves(given: Given, right: Callable[[Board, Sequence[str]], bool] = solves) -> tuple[list[str], bool]:
    """Choose the path of a record: the row's own where that is right, else a shortest one.

    Returns:
        The moves, and whether the row brought along others, which are wrong.
    """
    own = _given_moves(given.row)
    if own and right(given.board, own):
        return own, False
    return shortest_path(given.board, given.rng if given.settings.ties == "random" else None), bool(own)


def boxed_moves(moves: Sequence[str]) -> str:
    """Write moves as an answer."""
    return f"\\boxed{{{', '.join(moves)}}}"


def kind_of(moves: Sequence[str]) -> str:
    """Say how long a path is, for the report's counts."""
    return f"{len(moves)} move{'s' if len(moves) > 1 else ''}"


class MovesTask(BoardTask):
    """A task whose answer is a list of moves."""

    def parse(self, text: str, row: Mapping[str, Any]) -> list[str] | None:
        r"""Return the moves of the last ``\boxed{…}``; None without any."""
        return read_moves(last_boxed(text) or "") or None


class Planning(MovesTask):
    """VSP spatial planning; see the module."""

    name = NAME
    short = "<image>Fewest moves to the goal?"

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a text by the record's map.

        success: the moves end on the goal and meet no hole. optimal: success with as few moves as can be.
        invalid: there is no boxed answer, or no move in it. moves: how many the answer has; 0 when invalid.

        Raises:
            UserError: map_desc is no board.
        """
        board = parse_board(record["map_desc"], "the record to score")
        moves = self.parse(text, record) or []
        success = solves(board, moves)
        optimal = success and len(moves) == len(shortest_path(board))
        return {"success": success, "optimal": optimal, "invalid": not moves, "moves": len(moves)}

    def helper_text(self, row: Mapping[str, Any]) -> str:
        """Return the cells of the path that the helper draws, in order: "(0,0) (0,1) (1,1)"."""
        board, moves = parse_board(row["map_desc"], "the record"), _given_moves(row)
        if not moves:
            raise UserError("the record has no move in its answer; box the path that its helper draws")
        return " ".join(spot(cell) for cell in follow(board, moves))

    def make(self, given: Given) -> Draft:
        """Make one record; the row's own answer is kept when it solves the board, else replaced."""
        board, size = given.board, given.settings.cell_size
        moves, replaced = choose_moves(given)
        cells = follow(board, moves)
        text_output = boxed_moves(moves)
        if given.settings.answer == "cot":
            start, goal = spot(cells[0]), spot(find(board, GOAL))
            where = f"I start at [{start},Start] and the goal is at [{goal},Target]."
            text_output = with_helper([where], sentences(board, cells, moves), text_output)
        images, helpers = (state_picture(board, cells[0], None, size),), (path_picture(board, moves, size),)
        return Draft(text_output, images, helpers, {"path": moves}, kind=kind_of(moves), replaced=replaced)
