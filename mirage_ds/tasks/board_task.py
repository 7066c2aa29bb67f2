"""What the tasks about FrozenLake boards have in common: boards drawn at random or taken from a file."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from mirage_ds.tasks.board_style import Style
from mirage_ds.tasks.draft import Draft
from mirage_ds.tasks.maps import Board, map_hash
from mirage_ds.tasks.render import check_renderer
from mirage_ds.tasks.report import BuildReport
from mirage_ds.tasks.sources import read_exclude
from mirage_ds.tasks.spec import BuildSpec
from mirage_ds.tasks.supply import Supply
from mirage_ds.tasks.task import Task

# What a source row has under these names is made anew.
_MADE = ("text_input", "text_output", "image_input", "image_output")


class BoardTask(Task):
    """A task about one board a record.

    Attributes:
        name: names the stream of random boards, and stands in the records.
        classes: the classes of answers to balance; none where answers fall into no classes.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]] = ()
    build_settings: ClassVar[type[BuildSpec]] = BuildSpec

    @abstractmethod
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
            row: the row the board comes from.
            wanted: the class of the answer, a member of `classes`.

        Returns:
            None when this board gives no answer of the wanted class.
        """

    def build(self, settings: BuildSpec, report: BuildReport) -> list[Draft]:
        """Draw boards at random, or take them from --maps."""
        check_renderer()
        style = Style(settings.answer, settings.prompt, settings.ties, settings.cell_size)
        supply = Supply(self, settings, style, read_exclude(settings.exclude), report)
        rows = supply.draw() if settings.maps is None else supply.take(settings.maps)
        report.duplicates_kept = settings.maps is not None and not settings.drop_duplicates
        return [
            replace(draft, extra=self._extra(row, board, draft.extra, settings), key="") for row, board, draft in rows
        ]

    def _extra(
        self, row: Mapping[str, Any], board: Board, made: Mapping[str, Any], settings: BuildSpec
    ) -> dict[str, Any]:
        """Return what the record keeps: what the source row had beside the format's keys, and what made it."""
        extra: dict[str, Any] = {"map_id": int(map_hash(board)[:12], 16)}
        extra |= {key: value for key, value in row.items() if key not in _MADE}
        extra |= {"map_desc": board, "level": len(board), "task": self.name, **made, "seed": settings.seed}
        return extra if settings.maps is not None else extra | {"split": settings.split}
