r"""Questions with options, answered by a letter or by an option's text in the last ``\boxed{…}``."""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

from mirage_ds.data.messages import IMAGE_MARK
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.task import Task

_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
# A letter alone, in brackets, or before a sign that parts it from the option's text.
_LETTER = re.compile(r"\(\s*([A-Z])\s*\).*|([A-Z])(?:\s*[.):,].*)?", re.DOTALL)
_OWN_LETTER = re.compile(r"\(?([A-Z])\s*[).:]\s*(?=\S)")


def plain(text: str) -> str:
    """Return a text as options are compared: without LaTeX's text commands, case, spare space and a last full stop."""
    return " ".join(_TEXT.sub(r"\1", text).split()).rstrip(".").strip().casefold()


def read_choice(text: str, options: Sequence[str], letter_first: bool = True) -> str | None:
    r"""Return the letter of the option that the last ``\boxed{…}`` names; None when it names none.

    Of options with one text the first counts.

    Args:
        letter_first: of the options "B" and "A", ``\boxed{A}`` is the first; else it is the second.
    """
    boxed = last_boxed(text)
    if boxed is None:
        return None
    texts = [plain(option) for option in options]
    told = ascii_uppercase[texts.index(plain(boxed))] if plain(boxed) in texts else None
    match = _LETTER.fullmatch(" ".join(_TEXT.sub(r"\1", boxed).split()).upper())
    letter = (match.group(1) or match.group(2)) if match else None
    if letter not in (*ascii_uppercase[: len(options)],):
        letter = None
    return letter or told if letter_first else told or letter


def without_letters(options: Sequence[str]) -> list[str]:
    """Return the options without the letters A, B, … in front, where every one of them has its own."""
    matches = [_OWN_LETTER.match(option.strip()) for option in options]
    if [match and match.group(1) for match in matches] != list(ascii_uppercase[: len(options)]):
        return list(options)
    return [option.strip()[match.end() :] for option, match in zip(options, matches, strict=True) if match]


def marked_question(row: Mapping[str, Any]) -> str:
    """Return a row's `question`; where it does not say where its images stand, they stand in front."""
    question, paths = str(row["question"]), row.get("image_input") or []
    images = len(paths) if isinstance(paths, list) else 1
    return question if IMAGE_MARK in question or not images else f"{IMAGE_MARK * images}\n{question}"


class ChoiceTask(Task):
    """A task whose records have `options`; letter and text of an option are the same answer.

    Attributes:
        letter_first: see `read_choice`.
        boxed: what the question asks to put into the box.
    """

    letter_first: ClassVar[bool] = True
    boxed: ClassVar[str] = "the letter of the right option"

    def prompt(self, row: Mapping[str, Any], settings: Any) -> str:
        """Return the row's `question` with its options, one a line."""
        lines = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, row["options"], strict=False)]
        return "\n".join([marked_question(row), *lines, f"Put {self.boxed} in \\boxed{{}}."])

    def parse(self, text: str, row: Mapping[str, Any]) -> str | None:
        """Return the letter of the option that is answered; None when it is none of them."""
        return read_choice(text, row["options"], self.letter_first)
