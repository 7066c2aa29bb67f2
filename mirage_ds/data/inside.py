"""Pictures that stand inside a record, as bytes or base64: each becomes a file in the cache, named by its content."""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mirage_ds.config.run import cache_folder
from mirage_ds.errors import UserError
from mirage_ds.files import write_new

# How base64 of PNG, JPEG, GIF, WebP, BMP and TIFF begins.
_SIGNS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")
# A shorter text may be a path: base64 of JPEG begins like an absolute one.
_SHORTEST = 100


def folder_of_pictures(cache_dir: Path | None = None) -> Path:
    """Where pictures that came inside records files lie, in --cache_dir or where that is by default."""
    return cache_folder(cache_dir) / "pictures"


@contextmanager
def writable(cache: Path) -> Iterator[None]:
    """Turn what a full or read-only cache leads to into a sentence."""
    try:
        yield
    except OSError as error:
        how = "make room, or name another folder with --cache_dir"
        raise UserError(f"{cache}: cannot be written ({error.strerror}); {how}") from None


def _decoded(text: str) -> bytes:
    packed = "".join(text.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not whole base64") from None


def content_of(value: Any) -> bytes | None:
    """Return the bytes of a picture: of bytes, a data: URI, bare base64, or {"bytes": one of these or base64}.

    Returns:
        None where the value is none of them; it may be a path.

    Raises:
        ValueError: it is one, but cannot be decoded.
    """
    if isinstance(value, Mapping):
        own = value.get("bytes")
        return _decoded(own) if isinstance(own, str) and not own.startswith("data:") else content_of(own)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return None
    if value[:5].lower() == "data:":
        head, _, text = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("is a data: URI without base64")
        return _decoded(text)
    if len(value) < _SHORTEST or not value[:_SHORTEST].lstrip().startswith(_SIGNS):
        return None
    with suppress(ValueError):
        return _decoded(value)
    # A path after all: it has a dot or another character that base64 lacks.
    return None


def path_of(value: Any, pictures: Path) -> Any:
    """Return the path that a value of a record's image field names; the value itself where it is none.

    Args:
        pictures: where a picture that stands in the value is written.

    Raises:
        ValueError: see content_of.
        UserError: the cache cannot be written.
    """
    content = content_of(value)
    if content is None:
        return value.get("path", value) if isinstance(value, Mapping) else value
    name = hashlib.blake2b(content, digest_size=16).hexdigest()
    place = pictures.resolve() / name[:2] / name
    if not (place.is_file() and place.stat().st_size == len(content)):
        with writable(pictures):
            write_new(place, content)
    return str(place)
