r"""Any records whose answers end in ``\boxed{…}``: right is the record's own box, letter case and spaces aside.

Nothing is built or converted: the records are the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.task import Task


def _plain(text: str | None) -> str | None:
    """Fold letter case and white space; None where there is nothing."""
    return " ".join(text.casefold().split()) or None if text is not None else None


class BoxedAnswer(Task):
    """Own records, scored by what stands in the last box; see the module."""

    def prompt(self, row: Mapping[str, Any], settings: Any) -> str:
        """Refuse: the records have their questions."""
        raise UserError("task boxed builds no records; write them yourself (data/README.md)")

    def parse(self, text: str, row: Mapping[str, Any]) -> str | None:
        r"""Return what stands in the last ``\boxed{…}``, folded; None without any."""
        return _plain(last_boxed(text))

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        r"""Compare the last boxes of a text and of the record's answer.

        Raises:
            UserError: the record's answer has no box.
            KeyError: the record has no answer.
        """
        right = _plain(last_boxed(record["text_output"]))
        if right is None:
            raise UserError(r"task boxed: a record's answer has no \boxed{…} to compare with; write one at its end")
        found = _plain(last_boxed(text))
        return {"correct": float(found == right), "invalid": float(found is None)}
