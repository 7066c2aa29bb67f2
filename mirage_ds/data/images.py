"""A record's images: where they lie, how large they are, their pixels as RGB. What is wrong is a fault of the record.

Relative paths are looked for beside the record's file, then under the image root, then in the working directory.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mirage_ds.data.record import Record, RecordError
from mirage_ds.errors import reason, shown

# Beyond this the image processor refuses (transformers' smart_resize).
MAX_ASPECT = 200
# Pillow warns of more as of a decompression bomb, and raises at twice as many; here both are a fault.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
# Modes of 16 bits; Pillow would clip them to 8 instead of scaling, which leaves an almost white picture.
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")

_opening = threading.Lock()


@dataclass(frozen=True)
class ImageFinder:
    """Finds a record's images: beside the file, under the image root, in the working directory.

    Attributes:
        folders: where relative paths are looked for, in this order.
        within: with these, an image must lie in one of them, also behind links; None allows any place.
    """

    folders: tuple[Path, ...]
    within: tuple[Path, ...] | None = None

    @classmethod
    def beside(cls, data_path: Path, image_root: Path | None, confine: bool = False) -> ImageFinder:
        """Make the finder of one records file.

        Args:
            confine: refuse images outside the file's folder and the image root.
        """
        own = tuple(f.resolve() for f in (data_path.parent, image_root) if f is not None)
        return cls((*own, Path.cwd().resolve()), own if confine else None)

    def of(self, file: Path, pictures: Path) -> ImageFinder:
        """Make the finder that looks beside another records file, and else in the same places.

        Args:
            pictures: holds the pictures that came inside records files; never refused.
        """
        beside = file.parent.resolve()
        within = None if self.within is None else (beside, *self.within[1:], pictures.resolve())
        return ImageFinder((beside, *self.folders[1:]), within)

    def places(self, path: str) -> list[Path]:
        """List where an image may lie, in the order in which it is looked for."""
        return [Path(path)] if Path(path).is_absolute() else [folder / path for folder in self.folders]

    def find(self, record: Record, name: str, path: str) -> Path:
        """Return the image's place; RecordError that names every place looked at."""
        places = self.places(path)
        try:
            place = next((place for place in places if place.is_file()), None)
        except PermissionError as error:
            raise record.fault(
                name, f"{shown(path)} cannot be looked for ({error.strerror})", "make its folder readable"
            ) from None
        except OSError as error:
            how = "write the path of a file, not the image itself"
            raise record.fault(name, f"{shown(path)} is no path ({error.strerror})", how) from None
        if place is None:
            looked = ", ".join(str(place) for place in dict.fromkeys(places))
            raise record.fault(name, f"no image {path!r}: looked for {looked}", "correct the path or give --image_root")
        if self.within is None:
            return place
        # Returned as resolved: a link that is bent afterwards leads nowhere else.
        place = place.resolve()
        if not any(place.is_relative_to(folder) for folder in self.within):
            allowed = " and ".join(str(folder) for folder in self.within)
            raise record.fault(
                name, f"{path!r} is {place}, outside {allowed}", "copy it there, or leave --confine_paths out"
            )
        return place

    def size(self, record: Record, name: str, path: str) -> tuple[int, int]:
        """Return (height, width) in pixels, from the header alone."""
        place = self.find(record, name, path)
        try:
            with _open(place) as image:
                width, height = image.size
        except Exception as error:  # noqa: BLE001  # see _broken
            raise _broken(record, name, place, error) from None
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise record.fault(
                name, f"image {place} is {width}×{height}, a side ratio above {MAX_ASPECT}", "crop or replace it"
            )
        return height, width

    def load(self, record: Record, name: str, path: str) -> Image.Image:
        """Decode the image, of an animation the first picture, to RGB; transparency is dropped."""
        place = self.find(record, name, path)
        try:
            with _open(place) as image:
                size, mode = image.size, image.mode
                made = None if mode in ("I", "F") else _rgb(image)
        except Exception as error:  # noqa: BLE001  # see _broken
            raise _broken(record, name, place, error) from None
        if made is None:
            raise record.fault(
                name, f"image {place} has 32 bits a channel (mode {mode}), of unknown range", "save it with 8 bits"
            )
        if made.size != size:
            raise record.fault(
                name, f"image {place} holds a picture of another size than its header says", "replace the file"
            )
        return made


def _open(place: Path) -> Image.Image:
    """Open an image, decoding nothing; also what Pillow only warns of as of a decompression bomb is raised."""
    # Filters of warnings belong to the process, and images are checked in threads.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(place)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any 8-bit or 16-bit mode to RGB."""
    if image.mode in MODES_16_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The same colours as directly, without Pillow's warning.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _broken(record: Record, name: str, place: Path, error: Exception) -> RecordError:
    """Make the error of a file that Pillow fails on.

    A broken file leads Pillow's decoders to exceptions of almost any class (OSError, SyntaxError, struct.error,
    IndexError …); whichever it is, the file is what the user can mend, and the message keeps the reason.
    """
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return record.fault(name, f"image {place} has more than {MAX_PIXELS:,} pixels", "make it smaller")
    if isinstance(error, OSError) and error.errno is not None:
        return record.fault(name, f"image {place} cannot be read ({error.strerror})", "make it readable")
    return record.fault(name, f"image {place} cannot be decoded ({reason(error)})", "replace the file")
