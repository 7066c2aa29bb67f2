"""Kept features of the frozen vision tower: made once, memory-mapped, shared by ranks, epochs, stages and runs.

F merged features of an image, H hidden width of the language model, I images, R records.

    <folder>/<space>/space.json         what the features are a function of, besides the image
    <folder>/<space>/<shard>.arrow      Arrow IPC, a row an image: key, features (F · H numbers), CRC-32 of them
    <folder>/<space>/<shard>.verified   size and time of the shard when somebody last found all its checksums right

A *space* holds the features that one tower makes with one setting of the image processor in one dtype. Shards are
written under another name, renamed when they are whole, and never changed: runs that fill a space at the same time at
worst make an image twice. Features are read by their place in the file: pages of a map that one process alone has
touched count as its own memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mirage_ds.data.sources import Stamp, write_new
from mirage_ds.errors import UserError

# Raised whenever the bytes in a shard mean something else than before.
FORMAT = 1
SCHEMA = pa.schema(
    [("key_high", pa.uint64()), ("key_low", pa.uint64()), ("check", pa.uint32()), ("features", pa.large_binary())]
)
SHARD_BYTES = 128 << 20
# Files that a process may have open at a time are often 1024.
MOST_OPEN = 256

Key = tuple[int, int]


def image_key(file: Path) -> Key:
    """Return the key of an image file: 128 bits of its content's BLAKE2b hash."""
    digest = hashlib.blake2b(file.read_bytes(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class ImageKeys(NamedTuple):
    """The images of one field of a records file (input or helper images).

    Attributes:
        keys: (I, 2) uint64, row by row; sizes: (I,) merged features F of each.
        starts: (R + 1,) where each record's images begin.
    """

    keys: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray

    def rows_of(self, places: np.ndarray) -> np.ndarray:
        """Return the records, (n,), that the images at these places in `keys` belong to."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def of(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Places in `keys` of these records' images, record by record, (n,) int64."""
        own = np.asarray(rows, dtype=np.int64)
        first, counts = self.starts[own], self.starts[own + 1] - self.starts[own]
        # An image's place is its record's first one and its number within the record.
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(first, counts) + within


def sortable(keys: np.ndarray) -> np.ndarray:
    """Turn keys (I, 2) uint64 into (I,) strings of 16 bytes, which numpy sorts and searches whole."""
    return np.ascontiguousarray(keys, dtype=">u8").reshape(-1, 2).view("S16").reshape(-1)


def image_keys(rows: Sequence[Sequence[tuple[Key, int]]]) -> ImageKeys:
    """Make the table from each record's (key, merged features) pairs."""
    flat = [image for row in rows for image in row]
    return ImageKeys(
        keys=np.array([key for key, _ in flat], dtype=np.uint64).reshape(-1, 2),
        sizes=np.array([size for _, size in flat], dtype=np.int64),
        starts=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
    )


class Found(NamedTuple):
    """Where the features of images lie, sorted by key.

    Attributes:
        keys: (I,) see sortable.
        shard: (I,) number of the file; offset, size: (I,) bytes in it; check: (I,) CRC-32 of them.
    """

    keys: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    check: np.ndarray

    @classmethod
    def in_shards(cls, parts: Sequence[Found]) -> Found:
        """Join what several shards hold."""
        none = cls(np.empty(0, "S16"), *(np.empty(0, kind) for kind in (np.int32, np.int64, np.int64, np.uint32)))
        joined = [np.concatenate(columns) for columns in zip(none, *parts, strict=True)]
        order = np.argsort(joined[0], kind="stable")
        return cls(*(column[order] for column in joined))


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
        self.files: list[Path] = []
        self.descriptors: dict[int, int] = {}
        self.found = Found.in_shards([])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: another process opens its own."""
        return {**self.__dict__, "descriptors": {}}

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def refresh(self) -> list[Path]:
        """Look for shards anew; return those that cannot be read or belong to another space.

        What was found before is forgotten, so that a shard that somebody removed is missed here and not in the middle
        of a step.
        """
        self._close()
        self.files, foreign, parts = [], [], []
        for file in sorted(self.place.glob("*.arrow")):
            try:
                part = self._look(file, len(self.files))
            except (pa.ArrowInvalid, OSError, ValueError):
                foreign.append(file)
                continue
            self.files.append(file)
            parts.append(part)
        self.found = Found.in_shards(parts)
        return foreign

    def _look(self, file: Path, number: int) -> Found:
        """Find where the features of a shard lie; reads none of them."""
        with pa.memory_map(str(file)) as source:
            begin = source.read_buffer(1).address
            reader = pa.ipc.open_file(source)
            if reader.schema != SCHEMA or (reader.schema.metadata or {}).get(b"space") != self.space.encode():
                raise ValueError(f"{file} is of another space")
            table = reader.get_batch(0)
            _, offsets, content = table["features"].buffers()
            ends = np.frombuffer(offsets, dtype=np.int64)[: len(table) + 1]
            keys = np.stack([table["key_high"].to_numpy(), table["key_low"].to_numpy()], axis=1)
            return Found(
                keys=sortable(keys),
                shard=np.full(len(table), number, dtype=np.int32),
                offset=content.address - begin + ends[:-1],
                size=np.diff(ends),
                check=table["check"].to_numpy().copy(),
            )

    def _at(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in `found` of keys (I, 2), and which of them are right: (I,) int64, (I,) bool."""
        wanted = sortable(keys)
        at = np.searchsorted(self.found.keys, wanted)
        inside = at < len(self.found.keys)
        right = np.zeros(len(wanted), dtype=bool)
        right[inside] = self.found.keys[at[inside]] == wanted[inside]
        return at, right

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Tell which of `keys` (I, 2) are not here: (I,) bool."""
        return ~self._at(keys)[1]

    def _read(self, at: int) -> tuple[Path, bytes, bool]:
        """Return the shard of an image found, its features, and whether they have their checksum."""
        number = int(self.found.shard[at])
        if number not in self.descriptors:
            if len(self.descriptors) == MOST_OPEN:
                os.close(self.descriptors.pop(next(iter(self.descriptors))))
            self.descriptors[number] = os.open(self.files[number], os.O_RDONLY)
        content = os.pread(self.descriptors[number], int(self.found.size[at]), int(self.found.offset[at]))
        whole = len(content) == self.found.size[at] and zlib.crc32(content) == self.found.check[at]
        return self.files[number], content, whole

    def get(self, key: Sequence[int]) -> torch.Tensor:
        """Return the features of one image, (F, H); KeyError when they are not here.

        Raises:
            UserError: they have rotted since somebody verified them; only this process knows.
        """
        (at,), (right,) = self._at(np.asarray([key], dtype=np.uint64))
        if not right:
            raise KeyError(f"no features with key {tuple(key)} in {self.place}")
        file, content, whole = self._read(int(at))
        if not whole:
            # The next start reads all of the shard again.
            note_of(file).unlink(missing_ok=True)
            raise UserError(
                f"{file}: kept features are damaged; start again, which makes them anew, and look at the disk",
                everywhere=False,
            )
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(-1, self.width)

    def unverified(self, keys: np.ndarray) -> list[Path]:
        """List the shards with features of `keys` (I, 2) that are not as they were when somebody verified them."""
        at, right = self._at(keys)
        return [
            self.files[number] for number in np.unique(self.found.shard[at[right]]) if not _noted(self.files[number])
        ]

    def damaged(self, files: Sequence[Path]) -> list[Path]:
        """Read shards and return those of which a feature differs from its checksum; the others are noted as whole.

        Args:
            files: those that `refresh` has not met, as a network file system may have it, are left out.
        """
        bad = []
        for file in set(files) & set(self.files):
            # Before it is read: what is written meanwhile is not taken for verified.
            stamp = Stamp.of(file)
            own = np.flatnonzero(self.found.shard == self.files.index(file))
            if all(self._read(int(at))[2] for at in own):
                write_new(note_of(file), json.dumps(stamp).encode())
            else:
                bad.append(file)
        return bad


def note_of(shard: Path) -> Path:
    """Return the place of a shard's note that it is whole."""
    return shard.with_suffix(".verified")


def _noted(shard: Path) -> bool:
    try:
        return bool(json.loads(note_of(shard).read_bytes()) == [*Stamp.of(shard)])
    except (OSError, ValueError):
        # No note, or half of one: the shard is read.
        return False


class ShardWriter:
    """Writes features into a space, a shard at a time; nobody sees a shard before it is whole."""

    def __init__(self, store: FeatureStore, shard_bytes: int = SHARD_BYTES):
        self.store = store
        self.shard_bytes = shard_bytes
        self.waiting: list[tuple[int, int, int, bytes]] = []
        self.bytes = 0

    def add(self, key: Sequence[int], features: torch.Tensor) -> None:
        """Take the features (F, H) of one image; a full shard is written at once."""
        content = features.detach().to(self.store.dtype).cpu().contiguous().view(torch.uint8).numpy().tobytes()
        self.waiting.append((int(key[0]), int(key[1]), zlib.crc32(content), content))
        self.bytes += len(content)
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        self.store.place.mkdir(parents=True, exist_ok=True)
        (self.store.place / "space.json").write_text(json.dumps(json.loads(self.store.space), indent=1) + "\n")
        schema = SCHEMA.with_metadata({"space": self.store.space})
        columns = [
            pa.array(column, type=field.type)
            for column, field in zip(zip(*self.waiting, strict=True), schema, strict=True)
        ]
        name = uuid.uuid4().hex
        partial = self.store.place / f".{name}.partial"
        try:
            with partial.open("wb") as file:
                with pa.ipc.new_file(file, schema) as writer:
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.store.place / f"{name}.arrow")
        finally:
            partial.unlink(missing_ok=True)
        self.waiting, self.bytes = [], 0


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

    def bytes_of(self, places: np.ndarray | Sequence[int]) -> int:
        """Bytes that the features at these places take."""
        sizes = self.images.sizes[np.asarray(places, dtype=np.int64)]
        return math.prod((int(sizes.sum()), self.store.width, self.store.dtype.itemsize))
