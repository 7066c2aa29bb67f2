"""What a task is: where its records come from, how it asks, how it reads an answer, what it scores.

Own tasks are subclasses of `Task`, named on the command line as `package.module:Name`; docs/tasks.md shows a whole one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from mirage_ds.errors import UserError, shown
from mirage_ds.tasks import TASKS

if TYPE_CHECKING:
    from mirage_ds.tasks.draft import BuildReport, Draft


class Settings(BaseModel, extra="forbid"):
    """What a build or a conversion is told; each field becomes a flag. Tasks add their own."""

    out: Path = Field(description="folder to write: NAME.jsonl and images/")
    name: str = Field("data", pattern=r"^\w[\w.-]*$", description="name of the JSONL file, without .jsonl")


class Task(ABC):
    """A task.

    Every task asks, reads and scores; `prompt` and `parse` are its own. `data build` and `data convert` need the method
    of their name, and its settings; `data vary helper-text` needs `helper_text`.

    Attributes:
        build_settings: flags of `data build`; None where the task is not built.
        convert_settings: flags of `data convert`; None where there is nothing to convert.
    """

    build_settings: ClassVar[type[Settings] | None] = None
    convert_settings: ClassVar[type[Settings] | None] = None

    @cached_property
    def _name(self) -> str:
        """The name by which it is told to the user."""
        own = f"{type(self).__module__}:{type(self).__name__}"
        return next((name for name, known in TASKS.items() if known == own), own)

    def build(self, settings: Any, report: BuildReport) -> Iterable[Draft]:
        """Make records. They are written as they come, so a generator need not hold them all.

        Args:
            settings: an instance of `build_settings`.
            report: counts of what was left out go in here; the writer counts what is written.

        Raises:
            UserError: what the user can fix.
        """
        raise UserError(f"task {self._name} has build_settings but no build; write it, see `mirage-ds docs tasks`")

    def convert(self, source: Path, settings: Any, report: BuildReport) -> Iterable[Draft]:
        """Make records of a file or folder in the form in which others hand the data out; else as `build`."""
        raise UserError(f"task {self._name} has convert_settings but no convert; write it, see `mirage-ds docs tasks`")

    @abstractmethod
    def prompt(self, row: Mapping[str, Any], settings: Any) -> str:
        """Return the question, with an `<image>` mark for each input image (or none: images then stand first).

        Args:
            row: the record to be: everything but its two texts.
        """

    def helper_text(self, row: Mapping[str, Any]) -> str:
        """Say in words what a record's helper image shows, for `data vary helper-text`.

        Args:
            row: the record's extra keys, and `text_output`.

        Raises:
            UserError: the task has no words for it (this default).
            KeyError: the record lacks a key; its name and line are told to the user.
        """
        raise UserError(f"task {self._name} has no words for its helper; write its helper_text, or vary in another way")

    @abstractmethod
    def parse(self, text: str, row: Mapping[str, Any]) -> Any | None:
        """Read the answer out of a text, decoded or a record's own; None when there is none in it.

        Args:
            row: the record that the text answers; a missing key may raise KeyError.
        """

    def score_record(self, text: str, record: Mapping[str, Any]) -> dict[str, float]:
        """Score a decoded text; the first metric is the success rate, and `invalid` says that there was no answer.

        This default compares what `parse` reads out of the text and of the record's own answer: `correct`, `invalid`.

        Args:
            record: the record's extra keys and, where it has an answer, `text_output`.

        Raises:
            KeyError: the record lacks a key; its name and line are told to the user.
            UserError: there is no answer in the record's own.
        """
        right, found = self.parse(record["text_output"], record), self.parse(text, record)
        if right is None:
            own = shown(record["text_output"])
            raise UserError(f"a record's own answer {own} cannot be read by its task; fix its text_output")
        return {"correct": float(found == right), "invalid": float(found is None)}
