r"""VSP spatial planning: the shortest safe way from start to goal, as ``\boxed{RIGHT, DOWN}``.

The helper image is the start map with the answer's own path in red, never another path of the same length.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.board_style import Style, path_picture, state_picture
from mirage_ds.tasks.board_task import BoardTask
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import (
    GOAL,
    HOLE,
    MOVES,
    START,
    Board,
    find,
    follow,
    map_json,
    parse_board,
    shortest_path,
    step,
    tile,
)
from mirage_ds.tasks.rationale import sentences, spot, with_helper
from mirage_ds.tasks.spec import BuildSpec

NAME = "vsp-spatial-planning"

# Word for word the public training rows' prompt.
PROMPT = """
As a professional maze solver, your task is to analyze a grid-based map and devise an action plan that enables a player to reach the goal from the starting point without falling into any holes, using the fewest possible moves.

## Game Setup
- The game presents a fully observable grid-based map.
- The player starts at a specified grid square, with the goal located elsewhere on the map.
- Each grid square is either safe or contains a hole.
- Your goal is to guide the player to the goal while avoiding holes.
- For example, your final answer should be like "L,L,R,U,D", which means an action plan of left, left, right, up, and down.

## Moving Rules
- The action plan involves a series of moves: 'L' (left), 'R' (right), 'U' (up), or 'D' (down).
- Each move transfers the player to the adjacent square in that direction, provided it is a safe square. The player cannot move more than one square at a time.
- Moving off the edge of the map has no effect. The player will remain at the same square.
- DO NOT MOVE INTO A HOLE! Falling into a hole results in defeat.
- Locating at the grid containing the goal results in victory.

Here is the map: <image>

Please provide your action plan.
 The final answer MUST BE put in \\boxed{}."""  # noqa: E501
SHORT_PROMPT = "<image>Fewest moves to the goal?"

_LETTERS = {move[0]: move for move in MOVES}


@dataclass(frozen=True)
class PlanningScore:
    """The score of one answer.

    Attributes:
        success: the moves end on the goal and meet no hole.
        optimal: success with as few moves as can be.
        invalid: there is no boxed answer, or no move in it.
        moves: how many moves the answer has; 0 when invalid.
    """

    success: bool
    optimal: bool
    invalid: bool
    moves: int


def read_moves(boxed: str) -> list[str]:
    """Return the moves of an answer: the letters U, D, L, R of the upper-cased string ("RIGHT" holds but one)."""
    return [_LETTERS[letter] for letter in boxed.upper() if letter in _LETTERS]


def solves(board: Board, moves: Sequence[str]) -> bool:
    """Tell whether the moves end on the goal without meeting a hole; off-grid moves stay put."""
    cells = follow(board, moves)
    return tile(board, cells[-1]) == GOAL and all(tile(board, cell) != HOLE for cell in cells)


def score(text: str, map_desc: Any) -> PlanningScore:
    r"""Score a generated text by its last ``\boxed{…}`` on the map.

    Raises:
        UserError: map_desc is no board.
    """
    board = parse_board(map_desc, "the record to score")
    moves = read_moves(last_boxed(text) or "")
    success = solves(board, moves)
    return PlanningScore(success, success and len(moves) == len(shortest_path(board)), not moves, len(moves))


def _given_moves(row: Mapping[str, Any]) -> list[str]:
    """Return the moves a row brings along, in its answer or else in its `path`, a list; none without either."""
    boxed = last_boxed(str(row.get("text_output") or ""))
    path = row.get("path")
    return read_moves(boxed if boxed is not None else " ".join(map(str, path if isinstance(path, list) else ())))


def choose_moves(
    board: Board,
    rng: random.Random,
    style: Style,
    row: Mapping[str, Any] | None,
    right: Callable[[Board, Sequence[str]], bool] = solves,
) -> tuple[list[str], bool]:
    """Choose the path of a record: the row's own where that is right, else a shortest one.

    Returns:
        The moves, and whether the row brought along others, which are wrong.
    """
    given = _given_moves(row or {})
    if given and right(board, given):
        return given, False
    return shortest_path(board, style.ties, rng), bool(given)


def boxed_moves(moves: Sequence[str]) -> str:
    """Write moves as an answer."""
    return f"\\boxed{{{', '.join(moves)}}}"


def kind_of(moves: Sequence[str]) -> str:
    """Say how long a path is, for the report's counts."""
    return f"{len(moves)} move{'s' if len(moves) > 1 else ''}"


class Planning(BoardTask):
    """VSP spatial planning; see the module."""

    name = NAME

    def prompt(self, row: Mapping[str, Any], settings: BuildSpec) -> str:
        """Return the public prompt, or one short sentence."""
        return PROMPT if settings.prompt == "full" else SHORT_PROMPT

    def parse(self, text: str, row: Mapping[str, Any]) -> list[str] | None:
        r"""Return the moves of the last ``\boxed{…}``; None without any."""
        return read_moves(last_boxed(text) or "") or None

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a generated text for a record; the keys are those of `PlanningScore`."""
        return asdict(score(text, record["map_desc"]))

    def helper_text(self, row: Mapping[str, Any]) -> str:
        """Return the cells of the path that the helper draws, in order: "(0,0) (0,1) (1,1)"."""
        board, moves = parse_board(row["map_desc"], "the record"), _given_moves(row)
        if not moves:
            raise UserError("the record has no move in its answer; box the path that its helper draws")
        return " ".join(spot(cell) for cell in follow(board, moves))

    def make(
        self,
        board: Board,
        rng: random.Random,
        style: Style,
        row: Mapping[str, Any] | None = None,
        wanted: str | None = None,
    ) -> Draft:
        """Make one record from a solvable board.

        Args:
            row: the row the board comes from; its own answer is kept when it solves the board, else replaced.
            wanted: unused; answers fall into no classes.
        """
        moves, replaced = choose_moves(board, rng, style, row)
        cells = follow(board, moves)
        boxed = boxed_moves(moves)
        if style.answer == "direct":
            text_output = boxed
        else:
            start, goal = spot(find(board, START)), spot(find(board, GOAL))
            where = f"I start at [{start},Start] and the goal is at [{goal},Target]."
            text_output = with_helper([where], sentences(board, cells, moves), boxed)
        return Draft(
            text_output=text_output,
            images=(state_picture(board, cells[0], None, style.cell_size),),
            helpers=(path_picture(board, moves, style.cell_size),),
            extra={"path": moves},
            kind=kind_of(moves),
            key=map_json(board),
            replaced=replaced,
        )


def best_constant(boards: Sequence[Board], longest: int = 6) -> tuple[list[str], float]:
    """Find the one answer that solves most boards: what a model scores that never looks at the map.

    Args:
        longest: moves of the answer at most; every one of the 4 + 16 + … answers is tried.

    Returns:
        The moves, and the share of boards they solve.
    """
    best: tuple[list[str], int] = ([], 0)

    def extend(moves: list[str], places: list[tuple[Board, tuple[int, int]]]) -> None:
        nonlocal best
        # Only boards on which no hole was met are still here.
        solved = sum(tile(board, cell) == GOAL for board, cell in places)
        if moves and solved > best[1]:
            best = (moves, solved)
        if len(moves) < longest:
            for move in MOVES:
                after = [(board, step(board, cell, move)) for board, cell in places]
                extend([*moves, move], [(board, cell) for board, cell in after if tile(board, cell) != HOLE])

    extend([], [(board, find(board, START)) for board in boards])
    return best[0], best[1] / max(1, len(boards))
