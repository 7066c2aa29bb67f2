"""The request that a model gets: a template of text, filled with a record's question, pictures and answer."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import NamedTuple, Self

from mirage_ds.chat import read_template
from mirage_ds.curate.rationalize.form import Judge, described
from mirage_ds.curate.rewrite import Source
from mirage_ds.curate.spec import RationalizeSpec
from mirage_ds.data.record import IMAGE_MARK

SHIPPED = Path(__file__).with_name("prompt.txt")
QUESTION, ANSWER, FORM, HELPER = "{question}", "{answer}", "{form}", "<helper>"
_PLACES = re.compile(f"({'|'.join(map(re.escape, (QUESTION, ANSWER, FORM, IMAGE_MARK, HELPER)))})")


class Shown(NamedTuple):
    """A picture of a record, by the record's field and the path that stands there."""

    field: str
    path: str


def load_template(file: Path | None) -> str:
    """Read a template, or the one that comes along: it has each needed place, and the form where tags are described.

    Raises:
        UserError: no such text, or a place is missing or stands there too often.
    """
    places = {
        QUESTION: "the question", ANSWER: "the right answer", FORM: "the form of the reply",
        IMAGE_MARK: "the question's pictures", HELPER: "the helper images",
    }  # fmt: skip
    return read_template(file or SHIPPED, "--prompt", places, FORM)


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
    number = count(1)
    return re.sub(IMAGE_MARK, lambda _: f"[image {next(number)}]" if images > 1 else "[image]", question).strip()


class Questions(NamedTuple):
    """What a model is asked about the rows of a records file.

    Attributes:
        judges: of each row its judge.
    """

    spec: RationalizeSpec
    source: Source
    template: str
    judges: list[Judge]

    @classmethod
    def read(cls, file: Path, spec: RationalizeSpec) -> Self:
        """Read every row and the header of each of its images, before anything is asked.

        Raises:
            UserError: the first thing that is wrong with the template or a row.
        """
        template = load_template(spec.prompt)
        source = Source.read(file, spec, spec.most)
        judges = []
        for record in source.records:
            with source.told(record):
                judges.append(Judge.of(record, spec.task))
                for name, path in record.images(helpers=True):
                    source.finder.size(record, name, path)
        return cls(spec, source, template, judges)

    @property
    def digest(self) -> str:
        """SHA-256 of the template, in hexadecimal."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def request(self, row: int) -> list[str | Shown]:
        """Return a row's request as texts and pictures in their order.

        Where the question's own text marks its pictures it names them, as `[image 2]`; they stand at the template's
        place.
        """
        record = self.judges[row].record
        question = _named_marks(record.text_input, len(record.image_input))
        texts = {QUESTION: question, ANSWER: self.judges[row].boxed, FORM: described(len(record.image_output))}
        pieces: list[str | Shown] = []
        for piece in _PLACES.split(self.template):
            if piece == IMAGE_MARK:
                pieces += _named_pictures("image", "image_input", record.image_input)
            elif piece == HELPER:
                pieces += _named_pictures("helper image", "image_output", record.image_output)
            else:
                pieces.append(texts.get(piece, piece))
        made: list[str | Shown] = []
        kept = [piece for piece in pieces if piece]
        # Neighbouring texts are one: servers put a line break between two.
        for is_text, group in groupby(kept, lambda piece: isinstance(piece, str)):
            neighbours = list(group)
            made += ["".join(map(str, neighbours))] if is_text else neighbours
        return made
