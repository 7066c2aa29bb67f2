"""Where a build's records come from: boards drawn at random, or the rows of a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.board_style import Style
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import Board, check_solvable, most_holes, random_board, split_of, symmetry_hashes
from mirage_ds.tasks.report import BuildReport
from mirage_ds.tasks.sources import read_rows
from mirage_ds.tasks.spec import BuildSpec

if TYPE_CHECKING:
    from mirage_ds.tasks.board_task import BoardTask

# So many draws in a row without a new record mean that the supply is used up.
_PATIENCE = 20_000

# (the row it was made from, empty for a random board; its board; the record to be)
Row = tuple[dict[str, Any], Board, Draft]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Split `total` by the shares into whole numbers that add up to it (largest remainders first)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


@dataclass
class Supply:
    """Makes the drafts of one build.

    Attributes:
        task: makes a draft of a board.
        excluded: hashes of maps to leave out together with their symmetries.
        report: where duplicates, exclusions and replaced answers are counted.
    """

    task: BoardTask
    spec: BuildSpec
    style: Style
    excluded: frozenset[str]
    report: BuildReport

    def _is_excluded(self, board: Board) -> bool:
        """Tell whether the board or a symmetry of it is to be left out, and count it if so."""
        met = bool(self.excluded) and not self.excluded.isdisjoint(symmetry_hashes(board))
        self.report.excluded += met
        return met

    def _wanted(self, turn: int) -> str | None:
        """Return the class of the answer whose turn it is, None for a task without classes."""
        classes = self.task.classes
        return classes[turn % len(classes)] if classes else None

    def _draw_level(self, level: int, count: int) -> list[Row]:
        """Draw `count` different records on random boards of one level, the classes of answers in turn."""
        spec = self.spec
        rng = random.Random(f"{spec.seed}/{self.task.name}/{spec.split}/{level}")
        rows: list[Row] = []
        seen: set[str] = set()
        fruitless = 0
        while len(rows) < count:
            if fruitless == _PATIENCE:
                raise UserError(
                    f"level {level}: found only {len(rows)} different records of the {count} asked for "
                    f"(split {spec.split}, at most {most_holes(level, spec.hole_rate)} hole(s) a board, "
                    f"{len(self.excluded)} maps excluded); ask for fewer, raise --hole_rate, or give the level a "
                    "smaller share"
                )
            fruitless += 1
            board = random_board(level, spec.hole_rate, rng)
            if split_of(board) != spec.split or self._is_excluded(board):
                continue
            draft = self.task.make(board, rng, self.style, None, self._wanted(len(rows)))
            if draft is None:
                continue
            if draft.key in seen:
                self.report.duplicates += 1
                continue
            seen.add(draft.key)
            rows.append(({}, board, draft))
            fruitless = 0
        return rows

    def draw(self) -> list[Row]:
        """Draw the records of all levels on random boards, in an order of chance.

        Raises:
            UserError: a level has fewer different records than asked for.
        """
        spec = self.spec
        rows: list[Row] = []
        for level, count in zip(spec.levels, apportion(spec.count or 1000, spec.shares()), strict=True):
            rows += self._draw_level(level, count)
        random.Random(f"{spec.seed}/{self.task.name}/order").shuffle(rows)
        return rows

    def _make(self, board: Board, rng: random.Random, row: dict[str, Any], turn: int) -> Draft:
        """Make a record of the class whose turn it is, or of the next one that this board can have."""
        for at in range(max(1, len(self.task.classes))):
            draft = self.task.make(board, rng, self.style, row, self._wanted(turn + at))
            if draft is not None:
                return draft
        raise AssertionError(f"no record of any class on {board}")

    def take(self, path: Path) -> list[Row]:
        """Make the records of a file's boards, one per row in its order.

        Raises:
            UserError: a broken row, a board without a path, fewer rows than asked for.
        """
        spec = self.spec
        rows: list[Row] = []
        seen: set[str] = set()
        for number, (row, board, where) in enumerate(read_rows(path)):
            if len(rows) == spec.count:
                break
            check_solvable(board, where)
            if self._is_excluded(board):
                continue
            # Its own rng for each row: what a row becomes does not hang on the rows before it.
            rng = random.Random(f"{spec.seed}/{self.task.name}/maps/{number}")
            draft = self._make(board, rng, row, len(rows))
            again = f"{draft.key} {draft.text_output}"
            if again in seen:
                self.report.duplicates += 1
                if spec.drop_duplicates:
                    continue
            seen.add(again)
            self.report.replaced += draft.replaced
            rows.append((row, board, draft))
        if not rows or len(rows) < (spec.count or 0):
            raise UserError(
                f"{path}: found only {len(rows)} usable rows{f' of the {spec.count} asked for' if spec.count else ''} "
                f"({self.report.excluded} excluded, {self.report.duplicates} duplicates); "
                "ask for fewer or give more maps"
            )
        return rows
