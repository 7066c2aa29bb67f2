r"""VSP spatial reasoning: what a given plan leads to, as ``\boxed{A}``.

A reaches the goal, B falls into a hole, C ends safe but not at the goal. The helper image is the map after part of
the plan; a rationale is split at that step.
"""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.board_task import BoardTask, BuildSpec, Given
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import GOAL, HOLE, ICE, MOVES, Board, follow, parse_board, shortest_path, tile
from mirage_ds.tasks.rationale import seen, sentences, with_helper
from mirage_ds.tasks.render import state_picture

# What the question adds where the answer has a rationale.
_THINK = Path(__file__).parent / "prompts" / "vsp-spatial-reasoning.think.txt"
# In upper case, as an answer is read.
_LETTER = re.compile(r"[\s({\[]*(?:\\TEXT\{\s*)?([ABC])(?![A-Z])")
# Of the boards the builder draws few need more tries; a board without a hole never gives B.
_TRIES = 60


def outcome(board: Board, plan: Sequence[str]) -> str:
    """Return A, B or C: the first hole on the way decides, else where the plan ends."""
    return {GOAL: "A", HOLE: "B"}.get(tile(board, follow(board, plan)[-1]), "C")


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
    path = shortest_path(blind if way == "blind" else board, rng)
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

    name = "vsp-spatial-reasoning"
    short = "<image>Full Action Plan: {plan}. Does it reach the goal (A), fall (B) or neither (C)? Answer in \\boxed{}."
    classes = ("A", "B", "C")

    def prompt(self, row: Mapping[str, Any], settings: BuildSpec) -> str:
        """Return the question for the row's plan.

        With direct answers the long one leaves out the sentences that ask for a rationale, which the answer lacks.
        """
        think = _THINK.read_text(encoding="utf-8").removesuffix("\n") if settings.answer == "cot" else ""
        return super().prompt(row, settings).replace("{plan}", ", ".join(row["plan"])).replace("{think}", think)

    def parse(self, text: str, row: Mapping[str, Any]) -> str | None:
        r"""Return the letter of the last ``\boxed{…}``; None when it holds no A, B or C in front."""
        match = _LETTER.match((last_boxed(text) or "").upper())
        return match.group(1) if match else None

    def helper_text(self, row: Mapping[str, Any]) -> str:
        """Return what the helper shows beside the board: "The player is at [(2,1),Ice], facing DOWN."."""
        board, plan, at = parse_board(row["map_desc"], "the record"), _usable_plan(row["plan"]), row["helper_step"]
        if plan is None or type(at) is not int or not 0 < at <= len(plan):
            raise UserError("the record's helper_step is no step of its plan, a list of moves; fix them")
        cell = follow(board, plan[:at])[-1]
        # In a hole the player is gone from the picture, and with it the way it faces.
        facing = "" if tile(board, cell) == HOLE else f", facing {plan[at - 1]}"
        return f"The player is at {seen(board, cell)}{facing}."

    def make(self, given: Given) -> Draft | None:
        """Make one record; the row's own `plan`, a list of moves, is kept whatever class is wanted.

        Returns:
            None when no plan of the wanted class was found on this board.
        """
        board, rng, size = given.board, given.rng, given.settings.cell_size
        own = given.row.get("plan")
        usable = _usable_plan(own)
        drawn = (draw_plan(board, rng, wanted) for wanted in given.wanted)
        plan = usable or next((plan for plan in drawn if plan is not None), None)
        if plan is None:
            return None
        cells = follow(board, plan)
        letter = outcome(board, plan)
        text_output = f"\\boxed{{{letter}}}"
        split = rng.randint(1, len(cells) - 1)
        if given.settings.answer == "cot":
            told = sentences(board, cells, plan)
            text_output = with_helper(told[:split], told[split:], text_output)
        images = (state_picture(board, cells[0], None, size),)
        helpers = (state_picture(board, cells[split], plan[split - 1], size),)
        extra, replaced = {"plan": plan, "helper_step": split}, own is not None and usable is None
        return Draft(text_output, images, helpers, extra, kind=letter, key=" ".join(plan), replaced=replaced)
