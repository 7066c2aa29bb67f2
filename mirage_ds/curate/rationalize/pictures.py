"""A record's picture as the `data:` URL that a chat request carries."""

from __future__ import annotations

import base64
import io

from PIL import Image

from mirage_ds.curate.rationalize.prompt import Shown
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record

# Of these the file's own bytes are sent where they mean to everybody what they mean to the trainer.
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg"}
_ORIENTATION = 0x0112


def data_url(finder: ImageFinder, record: Record, shown: Shown, max_pixels: int | None) -> str:
    """Return the picture as base64 in a URL: the file's bytes, or a PNG of the pixels that the trainer sees.

    Args:
        max_pixels: a larger picture is made smaller, its sides in proportion.

    Raises:
        RecordError: the image is missing or does not decode.
    """
    picture = finder.load(record, *shown)
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        scale = (max_pixels / (width * height)) ** 0.5
        picture = picture.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
    else:
        content = finder.find(record, *shown).read_bytes()
        if (kind := _plain(content)) is not None:
            return _url(kind, content)
    # Pillow would write notes of the transparency and of the turn again, which are in the pixels now.
    picture.info.clear()
    made = io.BytesIO()
    picture.save(made, "PNG")
    return _url("image/png", made.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _plain(content: bytes) -> str | None:
    """Return the media type of a file of one picture, 8 bits, without transparency or a turn that viewers make."""
    with Image.open(io.BytesIO(content)) as image:
        plain = (
            image.format in _TYPES
            and image.mode in ("L", "RGB")
            and getattr(image, "n_frames", 1) == 1
            and "transparency" not in image.info
            and image.getexif().get(_ORIENTATION, 1) == 1
        )
        return _TYPES[str(image.format)] if plain else None
