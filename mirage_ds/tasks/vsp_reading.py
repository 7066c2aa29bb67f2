r"""The tasks that only look, without a helper image: they teach a model to see boards before it plans on them.

Transcription: what lies on each cell of the board, as ``\boxed{SFF/FHF/FFG}``. Path reading: the moves of the path that
is drawn on the board, which is Planning's helper image, as ``\boxed{RIGHT, DOWN}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_ds.tasks.board_task import BoardTask, Given, ReadingSpec
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import GOAL, HOLE, ICE, START, Board, find, follow, parse_board
from mirage_ds.tasks.render import path_picture, state_picture
from mirage_ds.tasks.vsp_planning import MovesTask, boxed_moves, choose_moves, kind_of, solves

# As gymnasium spells a FrozenLake map.
LETTERS = {START: "S", ICE: "F", HOLE: "H", GOAL: "G"}


def write_board(board: Board) -> str:
    """Write a board as rows of letters with / between them."""
    return "/".join("".join(LETTERS[cell] for cell in row) for row in board)


class Transcription(BoardTask):
    """Transcription of boards; see the module."""

    name = "vsp-transcription"
    short = "<image>Write the map's rows: S start, F ice, H hole, G goal, / between rows. Answer in \\boxed{}."
    build_settings = ReadingSpec

    def parse(self, text: str, row: Mapping[str, Any]) -> list[str] | None:
        r"""Return the rows of the last ``\boxed{…}``, in upper case; None without a board's letter."""
        rows = "".join((last_boxed(text) or "").upper().split()).split("/")
        return rows if any(letter in row for row in rows for letter in LETTERS.values()) else None

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a text by the record's map.

        success: every cell is right, and there are no others. cells: the share of the board's cells that are right.
        invalid: there is no boxed answer, or no letter S, F, H, G in it.

        Raises:
            UserError: map_desc is no board.
        """
        true = write_board(parse_board(record["map_desc"], "the record to score")).split("/")
        rows = self.parse(text, record) or []
        right = sum(a == b for row, own in zip(rows, true, strict=False) for a, b in zip(row, own, strict=False))
        return {"success": rows == true, "cells": right / len(true) ** 2, "invalid": not rows}

    def make(self, given: Given) -> Draft:
        """Make one record; nothing is drawn, and answers fall into no classes."""
        board = given.board
        picture = state_picture(board, find(board, START), None, given.settings.cell_size)
        return Draft(f"\\boxed{{{write_board(board)}}}", (picture,))


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
        images = (path_picture(given.board, moves, given.settings.cell_size),)
        return Draft(boxed_moves(moves), images, extra={"path": moves}, kind=kind_of(moves), replaced=replaced)
