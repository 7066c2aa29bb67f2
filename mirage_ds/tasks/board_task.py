"""What the tasks about FrozenLake boards have in common: boards drawn at random or taken from a file."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from mirage_ds.config.mixture import apportion
from mirage_ds.errors import UserError
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import Board, check_solvable, map_hash, most_holes, random_board, split_of, symmetry_hashes
from mirage_ds.tasks.render import check_renderer, load_tiles
from mirage_ds.tasks.report import BuildReport
from mirage_ds.tasks.sources import read_exclude, read_rows
from mirage_ds.tasks.spec import BuildSpec
from mirage_ds.tasks.task import Task

# What a source row has under these names is made anew.
_MADE = ("text_input", "text_output", "image_input", "image_output")
# So many draws in a row without a new record mean that the supply is used up.
_PATIENCE = 20_000


@dataclass(frozen=True)
class Given:
    """What a record is made of.

    Attributes:
        board: solvable.
        rng: what is drawn for this record.
        row: the row that the board comes from; empty for a random board.
        wanted: the class of the answer, a member of the task's `classes`; "" where it has none.
    """

    board: Board
    rng: random.Random
    settings: BuildSpec
    row: Mapping[str, Any]
    wanted: str


@cache
def full_prompt(name: str) -> str:
    """Return a task's long question; those of the public rows are theirs word for word, misspellings included."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


class BoardTask(Task):
    """A task about one board a record.

    Attributes:
        name: names the stream of random boards, and stands in the records.
        short: the question as one short sentence.
        classes: the classes of answers to balance; none where answers fall into no classes.
    """

    name: ClassVar[str]
    short: ClassVar[str]
    classes: ClassVar[tuple[str, ...]] = ()
    build_settings: ClassVar[type[BuildSpec]] = BuildSpec

    @abstractmethod
    def make(self, given: Given) -> Draft | None:
        """Make one record; None when the board gives no answer of the wanted class."""

    def prompt(self, row: Mapping[str, Any], settings: BuildSpec) -> str:
        """Return the long question, or one short sentence."""
        return full_prompt(self.name) if settings.prompt == "full" else self.short

    def build(self, settings: BuildSpec, report: BuildReport) -> list[Draft]:
        """Draw boards at random, or take them from --maps."""
        check_renderer()
        supply = _Supply(self, settings, read_exclude(settings.exclude), report)
        found = supply.draw() if settings.maps is None else supply.take(settings.maps)
        report.duplicates_kept = settings.maps is not None and not settings.drop_duplicates
        load_tiles(settings.cell_size)
        return found

    def wanted(self, turn: int) -> str:
        """Return the class of the answer whose turn it is, "" for a task without classes."""
        return self.classes[turn % len(self.classes)] if self.classes else ""


@dataclass(frozen=True)
class _Supply:
    """Makes the drafts of one build.

    Attributes:
        excluded: hashes of maps to leave out together with their symmetries.
        report: where duplicates, exclusions and replaced answers are counted.
    """

    task: BoardTask
    settings: BuildSpec
    excluded: frozenset[str]
    report: BuildReport

    def draw(self) -> list[Draft]:
        """Draw the records of all levels on random boards, in an order of chance.

        Raises:
            UserError: a level has fewer different records than asked for.
        """
        settings = self.settings
        counts = apportion(settings.count or 1000, settings.shares())
        found: list[Draft] = []
        for level, count in zip(settings.levels, counts, strict=True):
            found += self._draw_level(level, count)
        random.Random(f"{settings.seed}/{self.task.name}/order").shuffle(found)
        return found

    def _draw_level(self, level: int, count: int) -> list[Draft]:
        """Draw `count` different records on random boards of one level, the classes of answers in turn."""
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{self.task.name}/{settings.split}/{level}")
        found: dict[str, Draft] = {}
        fruitless = 0
        while len(found) < count:
            if fruitless == _PATIENCE:
                raise UserError(
                    f"level {level}: found only {len(found)} different records of the {count} asked for "
                    f"(split {settings.split}, at most {most_holes(level, settings.hole_rate)} hole(s) a board, "
                    f"{len(self.excluded)} maps excluded); ask for fewer, raise --hole_rate, or give the level a "
                    "smaller share"
                )
            fruitless += 1
            board = random_board(level, settings.hole_rate, rng)
            if split_of(board) != settings.split or self._is_excluded(board):
                continue
            draft = self.task.make(Given(board, rng, settings, {}, self.task.wanted(len(found))))
            if draft is None:
                continue
            if draft.key in found:
                self.report.duplicates += 1
                continue
            found[draft.key] = self._kept({}, board, draft)
            fruitless = 0
        return list(found.values())

    def take(self, path: Path) -> list[Draft]:
        """Make the records of a file's boards, one per row in its order.

        Raises:
            UserError: a broken row, a board without a path, fewer rows than asked for.
        """
        settings = self.settings
        found: list[Draft] = []
        seen: set[str] = set()
        for number, (row, board, where) in enumerate(read_rows(path)):
            if len(found) == settings.count:
                break
            check_solvable(board, where)
            if self._is_excluded(board):
                continue
            # Its own rng for each row: what a row becomes does not hang on the rows before it.
            rng = random.Random(f"{settings.seed}/{self.task.name}/maps/{number}")
            draft = self._make(board, rng, row, len(found))
            again = f"{draft.key} {draft.text_output}"
            if again in seen:
                self.report.duplicates += 1
                if settings.drop_duplicates:
                    continue
            seen.add(again)
            self.report.replaced += draft.replaced
            found.append(self._kept(row, board, draft))
        if not found or len(found) < (settings.count or 0):
            asked = f" of the {settings.count} asked for" if settings.count else ""
            raise UserError(
                f"{path}: found only {len(found)} usable rows{asked} ({self.report.excluded} excluded, "
                f"{self.report.duplicates} duplicates); ask for fewer or give more maps"
            )
        return found

    def _make(self, board: Board, rng: random.Random, row: dict[str, Any], turn: int) -> Draft:
        """Make a record of the class whose turn it is, or of the next one that this board can have."""
        for at in range(max(1, len(self.task.classes))):
            draft = self.task.make(Given(board, rng, self.settings, row, self.task.wanted(turn + at)))
            if draft is not None:
                return draft
        raise AssertionError(f"no record of any class on {board}")

    def _is_excluded(self, board: Board) -> bool:
        """Tell whether the board or a symmetry of it is to be left out, and count it if so."""
        met = bool(self.excluded) and not self.excluded.isdisjoint(symmetry_hashes(board))
        self.report.excluded += met
        return met

    def _kept(self, row: Mapping[str, Any], board: Board, draft: Draft) -> Draft:
        """Add what the source row had beside the format's keys, and what made the record."""
        extra: dict[str, Any] = {"map_id": int(map_hash(board)[:12], 16)}
        extra |= {key: value for key, value in row.items() if key not in _MADE}
        extra |= {"map_desc": board, "level": len(board), "task": self.task.name, **draft.extra}
        extra["seed"] = self.settings.seed
        return replace(draft, extra=extra if row else extra | {"split": self.settings.split}, key="")
