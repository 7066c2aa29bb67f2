"""A record's images: where they lie, how large they are, their pixels as RGB. What is wrong is a fault of the record.

Relative paths are looked for beside the record's file, then under the image root, then in the working directory.
An image is taken as viewers show it: turned as its EXIF says, on white where it is transparent (data/README.md).
"""

import hashlib
import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mirage_ds.data.record import Record
from mirage_ds.errors import reason, shown

# Beyond this the image processor refuses (transformers' smart_resize).
MAX_ASPECT = 200
# Pillow warns of more as of a decompression bomb, and raises at twice as many; here both are a fault.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
# Raised whenever a file is read as other pixels than before: features that are kept of it are made anew.
READING = 2
# What EXIF's orientation asks for; the last four exchange width and height.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
# What Pillow scales of a grey PNG's pixels, and not of the shade that is transparent there.
PNG_SCALES = {"L;2": 85, "L;4": 17}

# What a process remembers of the image files that it has looked at: so many answers.
REMEMBERED = 100_000

_opening = threading.Lock()
# Key of an image's content.
Key = tuple[int, int]
Found = TypeVar("Found")


class ImageError(Exception):
    """What is wrong with an image file, and how to mend it: its two arguments."""


class Sight(NamedTuple):
    """Where an image was found, as its number in ImageFinder.places, and its file's size and time; −1 if nowhere."""

    place: int
    bytes: int
    mtime_ns: int


def once(look: Callable[[Path], Found]) -> Callable[[Path], Found]:
    """Look at a file once, however many records show it, for as long as its size and time stay the same.

    What is wrong with it is remembered too: to find out, a decoder has done all its work.
    """

    @lru_cache(REMEMBERED)
    def remembered(file: Path, *_stamp: int) -> Found | ImageError:
        try:
            return look(file)
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                # The system's fault, which may pass.
                raise
            return fault_of(error)

    @wraps(look)
    def answer(file: Path) -> Found:
        stamp = file.stat()
        found = remembered(file, stamp.st_size, stamp.st_mtime_ns)
        if isinstance(found, ImageError):
            # Anew: one that is raised again keeps the frames of all before.
            raise ImageError(*found.args)
        return found

    return answer


def fault_of(error: Exception) -> ImageError:
    """Say what a look at an image file that failed tells of the file.

    A broken file leads Pillow's decoders to exceptions of almost any class (OSError, SyntaxError, struct.error,
    IndexError …); whichever it is, the file is what the user can fix, and the message keeps the reason.
    """
    if isinstance(error, ImageError):
        return error
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return ImageError(f"has more than {MAX_PIXELS:,} pixels", "make it smaller")
    if isinstance(error, OSError) and error.errno is not None:
        return ImageError(f"cannot be read ({error.strerror})", "make it readable")
    return ImageError(f"cannot be decoded ({reason(error)})", "replace the file")


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
    def beside(cls, data_path: Path, image_root: Path | None, confine: bool = False) -> Self:
        """Make the finder of a file or folder of records.

        Args:
            confine: refuse images outside the file's folder and the image root.
        """
        beside = data_path if data_path.is_dir() else data_path.parent
        own = tuple(f.resolve() for f in (beside, image_root) if f is not None)
        return cls((*own, Path.cwd().resolve()), own if confine else None)

    def of(self, file: Path, pictures: Path) -> Self:
        """Make a finder that looks beside another records file, and else in the same places.

        Args:
            pictures: holds the pictures that came inside records files; never refused.
        """
        beside = file.parent.resolve()
        within = None if self.within is None else (beside, *self.within[1:], pictures.resolve())
        return replace(self, folders=(beside, *self.folders[1:]), within=within)

    def places(self, path: str) -> list[Path]:
        """List where an image may lie, in the order in which it is looked for."""
        if path.startswith("file://"):
            plain = path.removeprefix("file://").removeprefix("localhost")
            # As it stands, which many write, and as a URI.
            return [place for one in dict.fromkeys([plain, unquote(plain)]) for place in self.places(one)]
        return [Path(path)] if Path(path).is_absolute() else [folder / path for folder in self.folders]

    def sight(self, path: str) -> Sight:
        """Look for an image as `find` does, reading nothing."""
        for number, place in enumerate(self.places(path)):
            try:
                found = os.stat(place)
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(found.st_mode):
                return Sight(number, found.st_size, found.st_mtime_ns)
        return Sight(-1, -1, -1)

    def find(self, record: Record, name: str, path: str) -> Path:
        """Return the image's place; RecordError that names every place looked at."""
        if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://", path):
            what = f"{shown(path)} is an address, and images are read from files alone"
            raise record.fault(name, what, "download it, and write the path of the file")
        places = self.places(path)
        try:
            place = next((place for place in places if place.is_file()), None)
        except PermissionError as error:
            what = f"{shown(path)} cannot be looked for ({error.strerror})"
            raise record.fault(name, what, "make its folder readable") from None
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
            what = f"{path!r} is {place}, outside {allowed}"
            raise record.fault(name, what, "copy it there, or leave --confine_paths out")
        return place

    def size(self, record: Record, name: str, path: str) -> tuple[int, int]:
        """Return (height, width) in pixels of the image as `load` returns it, from the header alone."""
        return self.look(size_of, record, name, path)

    def load(self, record: Record, name: str, path: str) -> Image.Image:
        """Decode the image, of an animation the first picture, to upright RGB on white."""
        return self.look(decoded, record, name, path)

    def check(self, record: Record, name: str, path: str) -> None:
        """RecordError unless the image decodes."""
        self.look(decodes, record, name, path)

    def key(self, record: Record, name: str, path: str) -> Key:
        """Return the key of the image's content; RecordError where it cannot be read."""
        return self.look(image_key, record, name, path)

    def look(self, see: Callable[[Path], Found], record: Record, name: str, path: str) -> Found:
        """Look at the image's file; whatever that leads to is a fault of the record."""
        place = self.find(record, name, path)
        try:
            return see(place)
        except Exception as error:  # noqa: BLE001  # see fault_of
            what, how = fault_of(error).args
        raise record.fault(name, f"image {place} {what}", how)


@once
def image_key(file: Path) -> Key:
    """Return the key of an image file: 128 bits of its content's BLAKE2b hash."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@once
def size_of(file: Path) -> tuple[int, int]:
    """Return (height, width) as viewers show the image, from the header alone as a rule."""
    with opened(file) as image:
        if image.format == "PNG" and _notes_behind_pixels(file):
            image.load()
        width, height = image.size
        # Pillow turns TIFF itself, and says its size as it is then.
        if image.format != "TIFF" and _orientation(image) >= 5:
            width, height = height, width
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(f"is {width}×{height}, a side ratio above {MAX_ASPECT}", "crop or replace it")
    return height, width


def decoded(file: Path) -> Image.Image:
    """Decode an image file to upright RGB on white."""
    with opened(file) as image:
        size, mode = image.size, image.mode
        made = upright_rgb(image)
    if made is None:
        raise ImageError(f"has 32 bits a channel (mode {mode}), of unknown range", "save it with 8 bits")
    # A turn may have exchanged the sides.
    if sorted(made.size) != sorted(size):
        raise ImageError("holds a picture of another size than its header says", "replace the file")
    return made


@once
def decodes(file: Path) -> bool:
    """Tell that an image file decodes; ImageError, or whatever a decoder raises, where it does not."""
    return bool(decoded(file))


def opened(place: Path | io.BytesIO) -> Image.Image:
    """Open an image, decoding nothing; also what Pillow only warns of as of a decompression bomb is raised."""
    # Filters of warnings belong to the process, and images are checked in threads.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(place)


def _notes_behind_pixels(png: Path) -> bool:
    """Tell whether a PNG has notes, of which one may be EXIF, where Pillow meets them only after decoding.

    From chunk to chunk: the pixels may be large, and may look like a note.
    """
    with png.open("rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


def _orientation(image: Image.Image) -> int:
    """Return the turn that EXIF (or XMP) asks for; 1, upright, where there is none."""
    try:
        # Not the PNG class's own, which decodes the picture first.
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  # as with pixels (fault_of); viewers show a picture whose notes are spoilt as it is
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


def png_of(image: Image.Image, level: int = 6) -> bytes:
    """Return an image as a PNG file, compressed with this effort, 0 to 9."""
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=level)
    return content.getvalue()


def upright_rgb(image: Image.Image) -> Image.Image | None:
    """Decode an image to RGB as viewers show it: its grey scaled to 8 bits, on white, turned as its EXIF says.

    Returns:
        None for 32 bits a channel, whose range nobody knows.
    """
    # How a PNG's pixels lie in the file; known until they are decoded.
    tiles: Any = getattr(image, "tile", None)
    packed = tiles[0][3] if image.format == "PNG" and tiles else ""
    image.load()
    turn = _orientation(image)
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "L":
        image.info["transparency"] = key * PNG_SCALES.get(packed, 1)
    if packed == "RGB;16B" and key is not None:
        image.info["transparency"] = tuple(shade >> 8 for shade in key)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        made = _from_16_bits(image, key)
    elif image.mode in ("I", "F"):
        return None
    else:
        made = image
    if made.has_transparency_data:
        layer = made.convert("RGBA")
        made = Image.new("RGB", layer.size, "white")
        made.paste(layer, mask=layer.getchannel("A"))
    if made.mode != "RGB":
        made = made.convert("RGB")
    return made if turn == 1 else made.transpose(TURNS[turn])


def _from_16_bits(image: Image.Image, key: int | None) -> Image.Image:
    """Take the upper 8 bits of grey of 16, or of 12; Pillow would clip them, which leaves an almost white picture.

    Args:
        key: the shade that is transparent.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    grey = Image.fromarray((values >> (tags.get(TIFF_BITS, (16,))[0] - 8)).astype(np.uint8))
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = ImageOps.invert(grey)
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey
