"""What a task hands to the writer: records whose pictures are not written yet, and counts of what was left out."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from PIL import Image

from mirage_ds.data.images import png_of


class Picture(NamedTuple):
    """A picture to be.

    Attributes:
        name: its path under images/. Equal names mean equal pictures: each is written once, and kept where it exists.
        content: makes the file's bytes; called in a thread.
    """

    name: str
    content: Callable[[], bytes]

    @classmethod
    def of(cls, image: Image.Image) -> Self:
        """Take a picture as a PNG that is named by its pixels."""
        known = f"{image.mode} {image.size} ".encode() + image.tobytes()
        digest = hashlib.sha256(known).hexdigest()[:16]
        # Photographs hardly shrink any further, whatever the effort.
        return cls(f"{digest[:2]}/{digest}.png", lambda: png_of(image, level=1))

    @classmethod
    def drawn(cls, name: str, draw: Callable[[], Image.Image]) -> Self:
        """Draw a picture later, as `name`.png; the name must say all that tells it from others."""
        return cls(f"{name}.png", lambda: png_of(draw()))

    @classmethod
    def stored(cls, content: bytes, suffix: str) -> Self:
        """Keep the bytes of an image file, named by their hash."""
        digest = hashlib.sha256(content).hexdigest()[:16]
        return cls(f"{digest[:2]}/{digest}.{suffix}", lambda: content)


@dataclass(frozen=True)
class Draft:
    """One record to be; its question is made by the task's `prompt`.

    Attributes:
        text_output: the answer, with a mark for each helper image; one helper needs no mark. Empty: nobody knows it.
        images: input images, in the order of their marks.
        helpers: helper images, one a latent block.
        extra: keys the record keeps beside the four of the format. `level` groups scores and counts.
        kind: the class of the answer, for the report's counts.
        key: two drafts of one board with one key are duplicates.
        replaced: the row it was made from gave an answer that is wrong.
    """

    text_output: str
    images: tuple[Picture, ...] = ()
    helpers: tuple[Picture, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    key: str = ""
    replaced: bool = False


@dataclass
class BuildReport:
    """The counts of a build or a conversion.

    Attributes:
        file: the JSONL file written.
        records: its rows.
        images: pictures written; those that records share are written once.
        levels: rows per `level`: the side of a board, the kind of a question.
        classes: rows per class of the answer.
        duplicates: repeated rows met (random boards: draws; the same map, or for reasoning the same map and plan).
        duplicates_kept: whether they stand in the file all the same.
        excluded: rows (random boards: draws) left out because a setting says so.
        notes: further lines, what and how many.
    """

    task: str
    file: Path
    records: int = 0
    images: int = 0
    levels: Counter[int | str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    duplicates_kept: bool = False
    excluded: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def note(self, what: str, count: int = 1) -> None:
        """Count something that only this task knows; 0 puts the line into the table all the same."""
        self.notes[what] += count
