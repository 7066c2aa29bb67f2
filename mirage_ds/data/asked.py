"""Questions asked in Python: texts and pictures, in whatever form they are at hand → records and their finder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mirage_ds.data.frames import as_rgb
from mirage_ds.data.images import ImageFinder, size_of
from mirage_ds.data.inside import folder_of_pictures, path_of
from mirage_ds.data.record import Record, check_marks
from mirage_ds.errors import UserError, shown

# A path; an image file's bytes, also as base64 or as {"bytes": …, "path": …} of `datasets`; an image; its pixels.
Picture = str | Path | bytes | Mapping | Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Given(ImageFinder):
    """A finder that was handed some images in place of paths."""

    given: Mapping[str, Image.Image] = field(default_factory=dict)

    def look(self, see: Callable[[Path], Any], record: Record, name: str, path: str) -> Any:
        """See ImageFinder; what is given has a size, and is decoded."""
        image = self.given.get(path)
        if image is None:
            return super().look(see, record, name, path)
        return (image.height, image.width) if see is size_of else image


def several(pictures: Any) -> list[Any]:
    """Return a list of pictures: a single one, which may well be a string, is a list of one, and None of none."""
    if pictures is None:
        return []
    return [pictures] if isinstance(pictures, Picture) else list(pictures)


def as_records(texts: Sequence[str], pictures: Sequence[Sequence[Picture]]) -> tuple[ImageFinder, list[Record]]:
    """Make records of questions and the pictures of each, and the finder of these.

    Raises:
        UserError: something is no picture.
        RecordError: the numbers of pictures and marks differ.
    """
    given: dict[str, Image.Image] = {}
    records = []
    for line, (text, own) in enumerate(zip(texts, pictures, strict=True), 1):
        names = []
        for number, one in enumerate(own, 1):
            name = f"image {number} of question {line}"
            try:
                found = path_of(as_rgb(one), folder_of_pictures())
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            if isinstance(found, Image.Image):
                given[name] = found
            elif not isinstance(found, str | Path):
                raise UserError(f"{name}: {shown(found)} is no picture; give a path, bytes, a PIL image or an array")
            names.append(name if name in given else str(found))
        records.append(Record(line, text, "", tuple(names), ()))
        check_marks(records[-1], answers=False)
    return Given((Path.cwd().resolve(),), given=given), records
