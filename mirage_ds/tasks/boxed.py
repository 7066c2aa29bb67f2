r"""Read the final answer, the last ``\boxed{…}``, out of a text; the task of any records whose answers have one.

Nothing is built or converted for that task: the records are the user's own.
"""

from collections.abc import Mapping
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks.task import Task

_OPEN = r"\boxed{"


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{…}`` that is closed, braces inside it included; None without one."""
    begin = text.rfind(_OPEN)
    while begin >= 0:
        depth, first = 1, begin + len(_OPEN)
        for at in range(first, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[first:at]
        begin = text.rfind(_OPEN, 0, begin)
    return None


class BoxedAnswer(Task):
    """Own records, scored by what stands in the last box, letter case and spaces aside."""

    def prompt(self, row: Mapping[str, Any], settings: Any) -> str:
        """Refuse: the records have their questions."""
        raise UserError(f"task {self._name} builds no records; write them yourself (`mirage-ds docs data/README`)")

    def parse(self, text: str, row: Mapping[str, Any]) -> str | None:
        r"""Return what stands in the last ``\boxed{…}``, letter case and spaces folded; None without text."""
        return " ".join((last_boxed(text) or "").casefold().split()) or None
