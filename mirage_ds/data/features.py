"""Kept features of the frozen vision tower: made once, read by ranks, epochs, stages and runs.

F merged features of an image, H hidden width of the language model, I images, R records.

    <folder>/<space>/<shard>.safetensors    a tensor an image, (F, H), called by the image's key in hexadecimal; as
                                            metadata the space and the CRC-32 of each tensor

A *space* holds the features that one tower makes with one setting of the image processor in one dtype; of helper images
what is kept are the k targets that they are pooled to. Shards are written under another name, renamed when they are
whole, and never changed: runs that fill a space at the same time at worst make an image twice. Features are read by
their place in the file: pages of a map that one process alone has touched count as its own memory.
"""

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from mirage_ds.data.sample import ImageKeys
from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically

# Raised whenever the bytes in a shard mean something else than before.
FORMAT = 2
SUFFIX = ".safetensors"
SHARD_BYTES = 128 << 20
# Files that a process may have open at a time are often 1024.
MOST_OPEN = 256


def sortable(keys: np.ndarray) -> np.ndarray:
    """Turn keys (I, 2) uint64 into (I,) strings of 16 bytes, which numpy sorts and searches whole."""
    return np.ascontiguousarray(keys, dtype=">u8").reshape(-1, 2).view("S16").reshape(-1)


# Where the features of an image lie: key (see sortable), the number of the shard, and bytes there with their CRC-32.
TABLE = np.dtype([("key", "S16"), ("shard", np.int32), ("offset", np.int64), ("size", np.int64), ("check", np.int64)])


@lru_cache(MOST_OPEN)
def _opened(shard: Path) -> pa.OSFile:
    """Open a shard; it is closed when others have taken its place. Under its name there is never another one."""
    return pa.OSFile(str(shard))


class Shard(NamedTuple):
    """A shard's name and what it holds, (I,) of TABLE, in the order of the file."""

    name: str
    table: np.ndarray


class FeatureStore:
    """The features of one space, found by image key.

    Args:
        folder: holds all spaces; made when the first shard is written.
        space: what the features are a function of (tower, image settings); its hash names the folder.
        width: H.
        dtype: of the features.
    """

    def __init__(self, folder: Path, space: dict[str, Any], width: int, dtype: torch.dtype):
        self.width = width
        self.dtype = dtype
        self.space = json.dumps({**space, "width": width, "dtype": str(dtype), "format": FORMAT}, sort_keys=True)
        self.place = folder / hashlib.sha256(self.space.encode()).hexdigest()[:32]
        self.names: list[str] = []
        # Of all shards together, sorted by key; the keys once more, since numpy would copy them out for every search.
        self.images = np.empty(0, TABLE)
        self.keys = np.empty(0, "S16")

    def listed(self) -> list[str]:
        """List the shards that this process sees."""
        return sorted(file.name for file in self.place.glob(f"*{SUFFIX}"))

    def open(self, name: str) -> Shard | None:
        """Find what a shard holds, by its header alone.

        Returns:
            None where it is gone, or was of another space or cut short and has been removed.
        """
        file = self.place / name
        try:
            with file.open("rb") as content:
                whole = os.fstat(content.fileno()).st_size
                begin = 8 + int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(begin - 8) if begin <= whole else b"")
            notes = header.pop("__metadata__")
            checks = json.loads(notes["checks"])
            spans = np.array([header[key]["data_offsets"] for key in header], dtype=np.int64).reshape(-1, 2)
            if notes["space"] != self.space or begin + spans.max(initial=0) != whole:
                raise ValueError(f"{file} is of another space, or cut short")
            table = np.zeros(len(header), TABLE)
            table["key"] = np.frombuffer(b"".join(bytes.fromhex(key) for key in header), dtype="S16")
            table["offset"], table["size"] = begin + spans[:, 0], spans[:, 1] - spans[:, 0]
            table["check"] = [checks[key] for key in header]
        # What damage makes of a header leads to any of these but the first.
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            file.unlink(missing_ok=True)
            return None
        return Shard(name, table)

    def opened(self, names: Sequence[str]) -> list[Shard]:
        """Open several shards; those that can be used."""
        return [shard for name in names if (shard := self.open(name))]

    def add(self, shards: Sequence[Shard]) -> None:
        """Take what shards hold into the table."""
        for number, shard in enumerate(shards, len(self.names)):
            shard.table["shard"] = number
        self.names += [shard.name for shard in shards]
        images = np.concatenate([self.images, *(shard.table for shard in shards)])
        self.images = images[np.argsort(images["key"], kind="stable")]
        self.keys = np.ascontiguousarray(self.images["key"])

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Tell which of `keys` (I, 2) are not here: (I,) bool."""
        return self._find(keys) < 0

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Places in the table of `keys` (I, 2), −1 for one that is not here; (I,) int64."""
        wanted = sortable(keys)
        if not len(self.keys):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, at, -1)

    def get(self, key: Sequence[int]) -> torch.Tensor:
        """Return the features of one image, (F, H); KeyError when they are not here.

        Raises:
            UserError: they have rotted or gone since the start; only this process knows.
        """
        at = int(self._find(np.asarray([key], dtype=np.uint64))[0])
        if at < 0:
            raise KeyError(f"no features with key {tuple(key)} in {self.place}")
        image = self.images[at]
        file = self.place / self.names[image["shard"]]
        try:
            content = _opened(file).read_at(int(image["size"]), int(image["offset"]))
        except FileNotFoundError:
            content = b""
        if len(content) != image["size"] or zlib.crc32(content) != image["check"]:
            # The next start makes all of the shard anew.
            with suppress(OSError):
                file.unlink()
            how = "start again, which makes them anew, and look at the disk"
            raise UserError(f"{file}: kept features are damaged; {how}", everywhere=False)
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(-1, self.width)


class ShardWriter:
    """Writes features into a space, a shard at a time; nobody sees a shard before it is whole.

    Attributes:
        written: the names of the shards.
    """

    def __init__(self, store: FeatureStore, shard_bytes: int = SHARD_BYTES):
        self.store = store
        self.shard_bytes = shard_bytes
        self.waiting: dict[str, torch.Tensor] = {}
        self.written: list[str] = []
        self.bytes = 0

    def add(self, key: Sequence[int], features: torch.Tensor) -> None:
        """Take the features (F, H) of one image; a full shard is written at once."""
        # Cloned: what is cut from a larger tensor would keep all of it.
        own = features.detach().to("cpu", self.store.dtype).clone(memory_format=torch.contiguous_format)
        self.waiting[f"{int(key[0]):016x}{int(key[1]):016x}"] = own
        self.bytes += own.nbytes
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        checks = {key: zlib.crc32(own.view(torch.uint8).numpy().data) for key, own in self.waiting.items()}
        content = save(self.waiting, {"space": self.store.space, "checks": json.dumps(checks)})
        name = f"{uuid.uuid4().hex}{SUFFIX}"
        write_atomically(self.store.place / name, content)
        self.written.append(name)
        self.waiting, self.bytes = {}, 0


class KeptFeatures(NamedTuple):
    """The features of one field of a records file, found by row."""

    images: ImageKeys
    store: FeatureStore

    def of(self, row: int) -> torch.Tensor:
        """Merged features of all images of a record, in order, (F, H)."""
        found = [self.store.get(self.images.keys[place]) for place in self.images.of([row])]
        return torch.cat([torch.empty(0, self.store.width, dtype=self.store.dtype), *found])

    def needs(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Places in `images` of these records' images, each image once, where it comes first; (n,) int64."""
        places = self.images.of(rows)
        _, first = np.unique(sortable(self.images.keys[places]), return_index=True)
        return places[np.sort(first)]

    def bytes_of(self, places: np.ndarray) -> int:
        """Bytes that the features at these places take."""
        return int(self.images.sizes[places].sum()) * self.store.width * self.store.dtype.itemsize
