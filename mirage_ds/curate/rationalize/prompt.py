"""The request that a model gets: a template of text, filled with a record's question, pictures and answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mirage_ds.curate.rationalize.form import described
from mirage_ds.data.record import IMAGE_MARK, Record
from mirage_ds.errors import UserError

SHIPPED = Path(__file__).with_name("prompt.txt")
QUESTION, ANSWER, FORM, HELPER = "{question}", "{answer}", "{form}", "<helper>"
_PLACES = re.compile(f"({'|'.join(map(re.escape, (QUESTION, ANSWER, FORM, IMAGE_MARK, HELPER)))})")


class Shown(NamedTuple):
    """A picture of a record, by the record's field and the path that stands there."""

    field: str
    path: str


@dataclass(frozen=True)
class Template:
    """A request's text with its places.

    Attributes:
        text: holds each needed place, and the form where a reply's tags are described.
    """

    text: str

    @classmethod
    def load(cls, file: Path | None) -> Template:
        """Read a template, or the one that comes along.

        Raises:
            UserError: no such text, or a place is missing or stands there too often.
        """
        place = file or SHIPPED
        try:
            text = place.read_text(encoding="utf-8-sig").strip()
        except OSError as error:
            raise UserError(f"--prompt {place}: cannot be read ({error.strerror}); name a text file") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt {place}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        for name, what in (
            (QUESTION, "the question"), (ANSWER, "the right answer"),
            (IMAGE_MARK, "the question's pictures"), (HELPER, "the helper images"),
        ):  # fmt: skip
            if text.count(name) != 1:
                found = f"stands there {text.count(name)} times" if name in text else "is missing"
                raise UserError(f"--prompt {place}: {name} {found}; write it once, where {what} shall stand")
        if text.count(FORM) > 1:
            raise UserError(f"--prompt {place}: {FORM} stands there {text.count(FORM)} times; write it once")
        return cls(text if FORM in text else f"{text}\n\n{FORM}")

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, record: Record, answer: str) -> list[str | Shown]:
        """Return the request as texts and pictures in their order.

        Where the question's own text marks its pictures it names them, as `[image 2]`; they stand at the template's
        place.
        """
        question = _named_marks(record.text_input, len(record.image_input))
        texts = {QUESTION: question, ANSWER: answer, FORM: described(len(record.image_output))}
        pieces: list[str | Shown] = []
        for piece in _PLACES.split(self.text):
            if piece == IMAGE_MARK:
                pieces += _named_pictures("image", "image_input", record.image_input)
            elif piece == HELPER:
                pieces += _named_pictures("helper image", "image_output", record.image_output)
            else:
                pieces.append(texts.get(piece, piece))
        made: list[str | Shown] = []
        for piece in pieces:
            # Neighbouring texts are one, and empty ones none.
            if isinstance(piece, str) and made and isinstance(made[-1], str):
                made[-1] += piece
            elif piece:
                made.append(piece)
        return made


def _named_pictures(name: str, field: str, paths: Sequence[str]) -> Iterator[str | Shown]:
    """Yield pictures, each of several behind its name."""
    for number, path in enumerate(paths, 1):
        if len(paths) > 1:
            yield f"[{name} {number}] "
        yield Shown(field, path)
    if not paths:
        yield "(none)"


def _named_marks(question: str, images: int) -> str:
    """Write `[image]`, or `[image 1]` and so on, where the pictures' marks stand."""
    head, *rest = question.split(IMAGE_MARK)
    for number, part in enumerate(rest, 1):
        head += f"[image {number}]" if images > 1 else "[image]"
        head += part
    return head.strip()
