r"""Transcription: what lies on each cell of the board, as ``\boxed{SFF/FHF/FFG}``.

No helper image. It teaches a model to see boards before it plans on them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mirage_ds.tasks.board_style import Style, state_picture
from mirage_ds.tasks.board_task import BoardTask
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import GOAL, HOLE, ICE, START, Board, find, map_json, parse_board
from mirage_ds.tasks.spec import BuildSpec, ReadingSpec

NAME = "vsp-transcription"
# As gymnasium spells a FrozenLake map.
LETTERS = {START: "S", ICE: "F", HOLE: "H", GOAL: "G"}

_PROMPT = """
Read the grid-based map in the picture and write down what lies on each of its squares.

- 'S' is the start, where the player stands.
- 'F' is frozen ice, which is safe.
- 'H' is a hole.
- 'G' is the goal.
- Write the rows from top to bottom, each from left to right without spaces, with '/' between the rows.
- For example, a map of three rows could be "SFF/FHF/FFG".

Here is the map: <image>

The final answer MUST BE put in \\boxed{}."""
_SHORT = "<image>Write the map's rows: S start, F ice, H hole, G goal, / between rows. Answer in \\boxed{}."


@dataclass(frozen=True)
class TranscriptionScore:
    """The score of one answer.

    Attributes:
        success: every cell is right, and there are no others.
        cells: the share of the board's cells that are right, each where it stands.
        invalid: there is no boxed answer, or no letter S, F, H, G in it.
    """

    success: bool
    cells: float
    invalid: bool


def write_board(board: Board) -> str:
    """Write a board as rows of letters with / between them."""
    return "/".join("".join(LETTERS[cell] for cell in row) for row in board)


def read_board(boxed: str) -> list[str]:
    """Return the rows of an answer, upper-cased and without white space; none where no letter is one of a board's."""
    rows = "".join(boxed.upper().split()).split("/")
    return rows if any(letter in row for row in rows for letter in LETTERS.values()) else []


def score(text: str, map_desc: Any) -> TranscriptionScore:
    r"""Score a generated text by its last ``\boxed{…}`` on the map.

    Raises:
        UserError: map_desc is no board.
    """
    true = write_board(parse_board(map_desc, "the record to score")).split("/")
    rows = read_board(last_boxed(text) or "")
    right = sum(
        one == other for row, own in zip(rows, true, strict=False) for one, other in zip(row, own, strict=False)
    )
    return TranscriptionScore(rows == true, right / len(true) ** 2, not rows)


class Transcription(BoardTask):
    """Transcription of boards; see the module."""

    name = NAME
    build_settings = ReadingSpec

    def prompt(self, row: Mapping[str, Any], settings: BuildSpec) -> str:
        """Return one short sentence, or the longer explanation."""
        return _PROMPT if settings.prompt == "full" else _SHORT

    def parse(self, text: str, row: Mapping[str, Any]) -> list[str] | None:
        r"""Return the rows of the last ``\boxed{…}``; None without a letter of a board."""
        return read_board(last_boxed(text) or "") or None

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a generated text for a record; the keys are those of `TranscriptionScore`."""
        return asdict(score(text, record["map_desc"]))

    def make(
        self,
        board: Board,
        rng: random.Random,
        style: Style,
        row: Mapping[str, Any] | None = None,
        wanted: str | None = None,
    ) -> Draft:
        """Make one record from a board; nothing is drawn, and answers fall into no classes."""
        return Draft(
            text_output=f"\\boxed{{{write_board(board)}}}",
            images=(state_picture(board, find(board, START), None, style.cell_size),),
            key=map_json(board),
        )
