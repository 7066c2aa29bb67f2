r"""VSP spatial reasoning: what a given plan leads to, as ``\boxed{A}``.

A reaches the goal, B falls into a hole, C ends safe but not at the goal. The helper image is the map after part of
the plan; a rationale is split at that step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.board_style import Style, state_picture
from mirage_ds.tasks.board_task import BoardTask
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import (
    GOAL,
    HOLE,
    ICE,
    MOVES,
    Board,
    follow,
    map_json,
    parse_board,
    shortest_path,
    tile,
)
from mirage_ds.tasks.rationale import seen, sentences, with_helper
from mirage_ds.tasks.spec import BuildSpec

NAME = "vsp-spatial-reasoning"
CLASSES = ("A", "B", "C")

# Word for word the public rows' prompt, misspelling included; {plan} stands for the plan, {think} for _THINK.
_TEMPLATE = """
As a professional maze solver, your task is to analyze a grid-based map and decide whether a given action plan enables a player to reach the goal from the starting point without falling into any holes.

## Setup
- The game presents a fully observable grid-based map.
- The player starts at a specified grid square, with the goal located elsewhere on the map.
- Each grid square is either safe or contains a hole.
- The provided action plan consists of a series of moves: 'LEFT' (left), 'RIGHT' (right), 'UP' (up), or 'DOWN' (down).
- Each move transfers the player to the adjacent square in that direction, provided it is a safe square. The player cannot move more than one square at a time.
- Moving off the edge of the map has no effect. The player will remain at the same square.
- For each action plan and map, there are 3 possible outcomes:
    - A. Action Success.
    - B. Action Failed. Falling into a hole.
    - C. Action Failed. Player safe but faile to reach the goal.

Determine the outcome of the action plan based on the map, and provide your answer with A, B, or C. 

Here is the map: <image>

Full Action Plan: {plan}

Please provide your answer.
{think} The final answer MUST BE put in \\boxed{{}}."""  # noqa: E501, W291
_THINK = (
    " You FIRST think about the reasoning process as an internal monologue and then provide the final answer."
    " The reasoning process MUST BE enclosed within <think> </think> tags."
)
_SHORT = "<image>Full Action Plan: {plan}. Does it reach the goal (A), fall (B) or neither (C)? Answer in \\boxed{{}}."

_LETTER = re.compile(r"[\s({\[]*(?:\\text\{\s*)?([ABC])(?![A-Z])")
# Of the boards the builder draws few need more tries; a board without a hole never gives B.
_TRIES = 60


@dataclass(frozen=True)
class ReasoningScore:
    """The score of one answer: `invalid` when no letter A, B or C is boxed last."""

    correct: bool
    invalid: bool


def outcome(board: Board, plan: Sequence[str]) -> str:
    """Return A, B or C: the first hole on the way decides, else where the plan ends."""
    end = tile(board, follow(board, plan)[-1])
    return {GOAL: "A", HOLE: "B"}.get(end, "C")


def read_letter(text: str) -> str | None:
    r"""Return the letter of the last ``\boxed{…}``; None when it holds no A, B or C in front."""
    match = _LETTER.match((last_boxed(text) or "").upper().replace("\\TEXT{", "\\text{"))
    return match.group(1) if match else None


def score(text: str, expected: str) -> ReasoningScore:
    """Score a generated text against the letter expected."""
    letter = read_letter(text)
    return ReasoningScore(letter == expected, letter is None)


def _perturbed(plan: Sequence[str], rng: random.Random) -> list[str]:
    """Return the plan with one or two moves replaced, put in or left out."""
    moves = list(plan)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(moves) + 1)
        new = [rng.choice(list(MOVES))] if rng.random() < 2 / 3 else []
        moves[at : at + (0 if rng.random() < 1 / 2 else 1)] = new
    return moves


def _candidate(board: Board, rng: random.Random) -> list[str]:
    """Draw a plausible plan: a shortest path, one blind to holes, part of one, either perturbed, or a random walk."""
    blind = tuple(tuple(ICE if cell == HOLE else cell for cell in row) for row in board)
    way = rng.choice(("shortest", "blind", "part", "perturbed", "perturbed", "walk"))
    if way == "walk":
        return [rng.choice(list(MOVES)) for _ in range(rng.randint(1, len(board) + 2))]
    path = shortest_path(blind if way == "blind" else board, "random", rng)
    if way == "part":
        return path[: rng.randint(1, len(path))]
    return _perturbed(path, rng) if way == "perturbed" else path


def draw_plan(board: Board, rng: random.Random, wanted: str) -> list[str] | None:
    """Draw a plan with the outcome `wanted`, ending where it first meets the goal or a hole, as the public ones do.

    Returns:
        The moves, at least one; None when the tries are used up (a board without a hole never gives B).
    """
    if wanted == "B" and not any(HOLE in row for row in board):
        return None
    for _ in range(_TRIES):
        plan = _candidate(board, rng)
        cells = follow(board, plan)
        ends = next((at for at, cell in enumerate(cells) if tile(board, cell) in (GOAL, HOLE)), len(plan))
        plan = plan[:ends]
        if plan and outcome(board, plan) == wanted:
            return plan
    return None


def _usable_plan(given: Any) -> list[str] | None:
    """Return the plan of a row; None where it is no list of moves, at least one."""
    usable = isinstance(given, list) and bool(given) and all(isinstance(move, str) and move in MOVES for move in given)
    return list(given) if usable else None


class Reasoning(BoardTask):
    """VSP spatial reasoning; see the module."""

    name = NAME
    classes = CLASSES

    def prompt(self, row: Mapping[str, Any], settings: BuildSpec) -> str:
        """Return the prompt for the row's plan.

        With direct answers the full prompt leaves out the sentences that ask for a rationale, which the answer lacks.
        """
        plan = ", ".join(row["plan"])
        if settings.prompt == "short":
            return _SHORT.format(plan=plan)
        return _TEMPLATE.format(plan=plan, think=_THINK if settings.answer == "cot" else "")

    def parse(self, text: str, row: Mapping[str, Any]) -> str | None:
        r"""Return the letter of the last ``\boxed{…}``; None without one."""
        return read_letter(text)

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a generated text against a record's own answer; the keys are those of `ReasoningScore`."""
        return asdict(score(text, str(read_letter(record["text_output"]))))

    def helper_text(self, row: Mapping[str, Any]) -> str:
        """Return what the helper shows beside the board: "The player is at [(2,1),Ice], facing DOWN."."""
        board, plan, at = parse_board(row["map_desc"], "the record"), _usable_plan(row["plan"]), row["helper_step"]
        if plan is None or type(at) is not int or not 0 < at <= len(plan):
            raise UserError("the record's helper_step is no step of its plan, a list of moves; mend them")
        cell = follow(board, plan[:at])[-1]
        # In a hole the player is gone from the picture, and with it the way it faces.
        facing = "" if tile(board, cell) == HOLE else f", facing {plan[at - 1]}"
        return f"The player is at {seen(board, cell)}{facing}."

    def make(
        self,
        board: Board,
        rng: random.Random,
        style: Style,
        row: Mapping[str, Any] | None = None,
        wanted: str | None = None,
    ) -> Draft | None:
        """Make one record from a solvable board.

        Args:
            row: the row the board comes from; its own `plan`, a list of moves, is kept.
            wanted: the class of the answer, drawn when None; without effect on a plan that is given.

        Returns:
            None when no plan of the wanted class was found on this board.
        """
        given = (row or {}).get("plan")
        usable = _usable_plan(given)
        plan = draw_plan(board, rng, wanted or rng.choice(CLASSES)) if usable is None else usable
        if plan is None:
            return None
        cells = follow(board, plan)
        letter = outcome(board, plan)
        boxed = f"\\boxed{{{letter}}}"
        split = rng.randint(1, len(cells) - 1)
        told = sentences(board, cells, plan)
        return Draft(
            text_output=boxed if style.answer == "direct" else with_helper(told[:split], told[split:], boxed),
            images=(state_picture(board, cells[0], None, style.cell_size),),
            helpers=(state_picture(board, cells[split], plan[split - 1], style.cell_size),),
            extra={"plan": plan, "helper_step": split},
            kind=letter,
            key=f"{map_json(board)} {' '.join(plan)}",
            replaced=given is not None and usable is None,
        )
