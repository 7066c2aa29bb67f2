"""Kept features of the frozen vision tower: made once, memory-mapped, shared by ranks, epochs, stages and runs.

F merged features of an image, H hidden width of the language model, I images, R records.

    <folder>/<space>/space.json       what the features are a function of, besides the image
    <folder>/<space>/<shard>.arrow    Arrow IPC, a row an image: key, features (F · H numbers), CRC-32 of them

A *space* holds the features that one tower makes with one setting of the image processor in one dtype. Shards are
written under another name, renamed when they are whole, and never changed: runs that fill a space at the same time at
worst make an image twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

# Raised whenever the bytes in a shard mean something else than before.
FORMAT = 1
SCHEMA = pa.schema(
    [("key_high", pa.uint64()), ("key_low", pa.uint64()), ("check", pa.uint32()), ("features", pa.large_binary())]
)
SHARD_BYTES = 128 << 20

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

    def row_of(self, place: int) -> int:
        """Return the record that the image at a place in `keys` belongs to."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def of(self, rows: Iterable[int]) -> list[int]:
        """List the places in `keys` of these records' images."""
        return [place for row in rows for place in range(self.starts[row], self.starts[row + 1])]


def image_keys(rows: Sequence[Sequence[tuple[Key, int]]]) -> ImageKeys:
    """Make the table from each record's (key, merged features) pairs."""
    flat = [image for row in rows for image in row]
    return ImageKeys(
        keys=np.array([key for key, _ in flat], dtype=np.uint64).reshape(-1, 2),
        sizes=np.array([size for _, size in flat], dtype=np.int64),
        starts=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
    )


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
        self.tables: dict[int, pa.RecordBatch] = {}
        self.keys = np.empty((0, 2), dtype=np.uint64)
        self.where = np.empty((0, 2), dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory maps behind: another process opens its own."""
        return {**self.__dict__, "tables": {}}

    def refresh(self) -> list[Path]:
        """Look for shards anew; return those that cannot be read or belong to another space.

        What was found before is forgotten, so that a shard that somebody removed is missed here and not in the middle
        of a step.
        """
        self.files, self.tables, foreign = [], {}, []
        keys, where = [self.keys[:0]], [self.where[:0]]
        for file in sorted(self.place.glob("*.arrow")):
            try:
                table = self._open(file)
            except (pa.ArrowInvalid, OSError, ValueError):
                foreign.append(file)
                continue
            number = len(self.files)
            self.files.append(file)
            self.tables[number] = table
            keys.append(np.stack([table["key_high"].to_numpy(), table["key_low"].to_numpy()], axis=1))
            where.append(np.stack([np.full(len(table), number), np.arange(len(table))], axis=1))
        made = np.concatenate(keys)
        order = np.lexsort((made[:, 1], made[:, 0]))
        self.keys, self.where = made[order], np.concatenate(where)[order]
        return foreign

    def _open(self, file: Path) -> pa.RecordBatch:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if reader.schema != SCHEMA or (reader.schema.metadata or {}).get(b"space") != self.space.encode():
            raise ValueError(f"{file} is of another space")
        return reader.get_batch(0)

    def _place(self, key: Sequence[int]) -> int | None:
        high, low = np.uint64(key[0]), np.uint64(key[1])
        at = int(np.searchsorted(self.keys[:, 0], high))
        while at < len(self.keys) and self.keys[at, 0] == high:
            if self.keys[at, 1] == low:
                return at
            at += 1
        return None

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Tell which of `keys` (I, 2) are not here: (I,) bool."""
        return np.array([self._place(key) is None for key in keys], dtype=bool)

    def _row(self, key: Sequence[int]) -> tuple[Path, pa.RecordBatch, int]:
        at = self._place(key)
        if at is None:
            raise KeyError(f"no features with key {tuple(key)} in {self.place}")
        number, row = (int(value) for value in self.where[at])
        if number not in self.tables:
            self.tables[number] = self._open(self.files[number])
        return self.files[number], self.tables[number], row

    def get(self, key: Sequence[int]) -> torch.Tensor:
        """Return the features of one image, (F, H); KeyError when they are not here."""
        _, table, row = self._row(key)
        stored = np.frombuffer(table["features"][row].as_buffer(), dtype=np.uint8)
        # A copy: torch has no read-only tensors, and the file must never change.
        return torch.from_numpy(stored.copy()).view(self.dtype).view(-1, self.width)

    def damaged(self, keys: np.ndarray) -> list[Path]:
        """Read the features of `keys` (I, 2) and return the shards in which one differs from its checksum."""
        bad = set()
        for key in keys:
            file, table, row = self._row(key)
            if zlib.crc32(table["features"][row].as_buffer()) != table["check"][row].as_py():
                bad.add(file)
        return sorted(bad)


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
        places = self.images.of([row])
        found = [self.store.get(self.images.keys[place]) for place in places]
        return torch.cat([torch.empty(0, self.store.width, dtype=self.store.dtype), *found])

    def needs(self, rows: Iterable[int]) -> list[int]:
        """Places in `images` of these records' images, each image once."""
        first: dict[Key, int] = {}
        for place in self.images.of(rows):
            high, low = self.images.keys[place].tolist()
            first.setdefault((high, low), place)
        return list(first.values())

    def bytes_of(self, places: Sequence[int]) -> int:
        """Bytes that the features at these places take."""
        return math.prod((int(self.images.sizes[list(places)].sum()), self.store.width, self.store.dtype.itemsize))
