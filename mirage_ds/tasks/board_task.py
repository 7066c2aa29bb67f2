"""What the tasks about FrozenLake boards have in common: boards drawn at random or taken from a file."""

import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from mirage_ds.config.mixture import apportion
from mirage_ds.data.flat import json_lines
from mirage_ds.data.folders import find_files
from mirage_ds.data.messages import FIELDS
from mirage_ds.data.record import parse_object
from mirage_ds.errors import UserError
from mirage_ds.tasks import maps
from mirage_ds.tasks.draft import BuildReport, Draft
from mirage_ds.tasks.maps import Board, map_hash
from mirage_ds.tasks.render import load_tiles
from mirage_ds.tasks.tables import read_rows, reading
from mirage_ds.tasks.task import Settings, Task

_RANDOM_ONLY = ("levels", "proportions", "hole_rate", "split")
_HASH = re.compile(r"[0-9a-f]{64}(\s+\S.*)?")
# So many draws in a row without a new record mean that the supply is used up.
_PATIENCE = 20_000


class BuildSpec(Settings):
    """What to build."""

    maps: Path | None = Field(None, description="JSONL file with map_desc to take the boards from; else random boards")
    count: int | None = Field(None, ge=1, description="rows to make [default: 1000, or every row of --maps]")
    levels: list[int] = Field([3, 4, 5, 6], description="sides of the random boards, 3 to 8")
    proportions: list[float] | None = Field(
        None, description="shares of the levels [default: side - 2, the paper's 1:2:3:4 for levels 3 to 6]"
    )
    hole_rate: float = Field(0.2, ge=0, le=0.5, description="greatest share of holes on a random board")
    split: Literal["train", "dev", "test"] = Field(
        "train", description="which of three sets of random boards, disjoint up to symmetry whatever the seed"
    )
    seed: int = Field(0, description="the same seed gives the same bytes")
    exclude: list[Path] = Field(
        [], description="maps to leave out with their rotations and reflections: JSONL with map_desc, or SHA-256 list"
    )
    drop_duplicates: bool = Field(False, description="with --maps: leave out rows that repeat map and answer")
    answer: Literal["direct", "cot"] = Field(
        "direct", description="the boxed answer alone, or a rationale by rule around the helper image"
    )
    prompt: Literal["full", "short"] = Field("full", description="the public prompt, or one short sentence")
    ties: Literal["rule", "random"] = Field(
        "rule", description="which of several shortest paths: by a fixed order of moves, or at random"
    )
    cell_size: int = Field(64, ge=8, le=256, description="px a cell; at 64 the pictures are the benchmark's")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.maps is not None:
            idle = [name for name in _RANDOM_ONLY if name in self.model_fields_set]
            if idle:
                raise ValueError(f"--{idle[0]} is about random boards and cannot go with --maps; leave one of them out")
            return self
        if self.drop_duplicates:
            raise ValueError("--drop_duplicates goes with --maps; random boards never repeat")
        if not self.levels or len(set(self.levels)) != len(self.levels) or not all(3 <= x <= 8 for x in self.levels):
            raise ValueError(f"--levels is {self.levels}; give different sides from 3 to 8")
        shares, count = self.shares(), len(self.levels)
        if len(shares) != count or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"--proportions is {self.proportions}; give one share per level, {count} in all")
        return self

    def shares(self) -> list[float]:
        """Return one share per level."""
        return self.proportions if self.proportions is not None else [level - 2.0 for level in self.levels]


class ReadingSpec(BuildSpec):
    """What to build of a task whose answer is read off the picture: no helper, so no rationale around one."""

    answer: Literal["direct"] = Field("direct", description="the boxed answer alone")
    prompt: Literal["full", "short"] = Field("short", description="a longer explanation, or one short sentence")


def read_exclude(paths: Sequence[Path]) -> frozenset[str]:
    """Return the hashes of the maps in the files, each a JSONL file with `map_desc` or a list of map hashes.

    A map meets the list when one of its `symmetry_hashes` is in it.

    Raises:
        UserError: a missing or empty file, or a line that is neither.
    """
    hashes: set[str] = set()
    for path in paths:
        with reading(path), path.open("rb") as content:
            lines = [(number, line.strip()) for number, _, _, line in json_lines(content, path)]
            if not lines:
                raise UserError(f"{path}: the file is empty; write one map a line")
            for number, line in lines:
                where = f"{path}, line {number}"
                if line.startswith("{"):
                    hashes.add(map_hash(maps.parse_board(parse_object(line, number).get("map_desc"), where)))
                elif _HASH.fullmatch(line.lower()):
                    hashes.add(line[:64].lower())
                else:
                    what = "neither a record with 'map_desc' nor the SHA-256 of a map (64 hex digits)"
                    raise UserError(f"{where}: {what}; give --exclude a JSONL file or a list of hashes")
    return frozenset(hashes)


class Given(NamedTuple):
    """What a record is made of.

    Attributes:
        board: solvable.
        rng: what is drawn for this record.
        row: the row that the board comes from; empty for a random board.
        wanted: the classes of answers to try, members of the task's `classes`, in this order.
    """

    board: Board
    rng: random.Random
    settings: BuildSpec
    row: Mapping[str, Any]
    wanted: Sequence[str]


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
        """Make one record; None when the board gives no answer of the wanted classes."""

    def prompt(self, row: Mapping[str, Any], settings: BuildSpec) -> str:
        """Return the long question, the public rows' word for word, misspellings included, or one short sentence."""
        long = Path(__file__).parent / "prompts" / f"{self.name}.txt"
        return long.read_text(encoding="utf-8").removesuffix("\n") if settings.prompt == "full" else self.short

    def build(self, settings: BuildSpec, report: BuildReport) -> list[Draft]:
        """Draw boards at random, or take them from --maps."""
        # Before any work: it needs packages, and is no matter for threads.
        load_tiles(settings.cell_size)
        supply = _Supply(self, settings, read_exclude(settings.exclude), report)
        report.duplicates_kept = settings.maps is not None and not settings.drop_duplicates
        return supply.draw() if settings.maps is None else supply.take(settings.maps)


class _Supply(NamedTuple):
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
        levels = zip(settings.levels, apportion(settings.count or 1000, settings.shares()), strict=True)
        found = [draft for level, count in levels for draft in self._draw_level(level, count)]
        random.Random(f"{settings.seed}/{self.task.name}/order").shuffle(found)
        return found

    def _draw_level(self, level: int, count: int) -> list[Draft]:
        """Draw `count` different records on random boards of one level, the classes of answers in turn."""
        settings = self.settings
        rng = random.Random(f"{settings.seed}/{self.task.name}/{settings.split}/{level}")
        found: dict[tuple[Board, str], Draft] = {}
        fruitless = 0
        while len(found) < count:
            if fruitless == _PATIENCE:
                holes, excluded = maps.most_holes(level, settings.hole_rate), len(self.excluded)
                among = f"split {settings.split}, at most {holes} hole(s) a board, {excluded} maps excluded"
                what = f"found only {len(found)} different records of the {count} asked for ({among})"
                how = "ask for fewer, raise --hole_rate, or give the level a smaller share"
                raise UserError(f"level {level}: {what}; {how}")
            fruitless += 1
            board = maps.random_board(level, settings.hole_rate, rng)
            if maps.split_of(board) != settings.split or self._is_excluded(board):
                continue
            draft = self.task.make(Given(board, rng, settings, {}, self._classes(len(found))[:1]))
            if draft is None:
                continue
            known = (board, draft.key)
            if known not in found:
                found[known] = self._kept({}, board, draft)
                fruitless = 0
            else:
                self.report.duplicates += 1
        return list(found.values())

    def take(self, path: Path) -> list[Draft]:
        """Make the records of a file's boards, one per row in its order.

        Raises:
            UserError: a broken row, a board without a path, fewer rows than asked for.
        """
        settings = self.settings
        found: list[Draft] = []
        seen: set[tuple[Board, str, str]] = set()
        for source in read_rows(find_files(path)):
            if len(found) == settings.count:
                break
            row, board = source.values, maps.parse_board(source.values.get("map_desc"), source.where)
            maps.check_solvable(board, source.where)
            if self._is_excluded(board):
                continue
            # Its own rng for each row: what a row becomes does not hang on the rows before it.
            rng = random.Random(f"{settings.seed}/{self.task.name}/maps/{source.number}")
            draft = self.task.make(Given(board, rng, settings, row, self._classes(len(found))))
            assert draft is not None, "every board has a plan of some class"
            known = (board, draft.key, draft.text_output)
            self.report.duplicates += known in seen
            if known in seen and settings.drop_duplicates:
                continue
            seen.add(known)
            if draft.replaced:
                self.report.note("wrong answers replaced")
            found.append(self._kept(row, board, draft))
        if not found or len(found) < (settings.count or 0):
            asked = f" of the {settings.count} asked for" if settings.count else ""
            lost = f"{self.report.excluded} excluded, {self.report.duplicates} duplicates"
            what = f"found only {len(found)} usable rows{asked} ({lost})"
            raise UserError(f"{path}: {what}; ask for fewer or give more maps")
        return found

    def _classes(self, made: int) -> tuple[str, ...]:
        """Return the classes of answers, first the one whose turn it is after so many records."""
        classes = self.task.classes
        turn = made % max(1, len(classes))
        return classes[turn:] + classes[:turn]

    def _is_excluded(self, board: Board) -> bool:
        """Tell whether the board or a symmetry of it is to be left out, and count it if so."""
        met = bool(self.excluded) and not self.excluded.isdisjoint(maps.symmetry_hashes(board))
        self.report.excluded += met
        return met

    def _kept(self, row: Mapping[str, Any], board: Board, draft: Draft) -> Draft:
        """Add what the source row had beside the format's keys, and what made the record."""
        extra: dict[str, Any] = {"map_id": int(map_hash(board)[:12], 16)}
        extra |= {key: value for key, value in row.items() if key not in FIELDS}
        extra |= {"map_desc": board, "level": len(board), "task": self.task.name, **draft.extra}
        extra["seed"] = self.settings.seed
        return replace(draft, extra=extra if row else extra | {"split": self.settings.split}, key="")
