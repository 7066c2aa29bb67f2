"""What the tests of the index share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mirage_ds.config.mixture import Records
from mirage_ds.config.run import cache_folder
from mirage_ds.data.encode import Encoder
from mirage_ds.data.index import Index
from mirage_ds.data.make_index import Maker
from mirage_ds.data.record import Record
from mirage_ds.data.selection import Selection, usable

Make = Callable[..., Encoder]

BREAK: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 3 // 4],
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


def open_index(
    data_path: Records, encoder: Encoder, keep: Sequence[str] = (), cache_dir: Path | None = None, **how: Any
) -> Index:
    """The index as one process opens or makes it."""
    return Maker(data_path, encoder, keep, cache_folder(cache_dir), **how).index()


def selected(
    data_path: Records,
    encoder: Encoder,
    max_length: int,
    max_dropped_share: float,
    keep: Sequence[str] = (),
    max_bad_share: float | None = None,
    cache_dir: Path | None = None,
) -> Selection:
    """Open the index of the records, and choose the rows that can be trained on."""
    rows = open_index(data_path, encoder, keep, cache_dir)
    return usable(rows, data_path, max_length, max_dropped_share, max_bad_share)


def every(index: Index) -> list[Record]:
    """All records of an index that can be used."""
    return [index.record(row) for row in np.flatnonzero(index["tokens"]).tolist()]


class Counted:
    """Counts the rows laid out and the images opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rows = self.images = 0
        lay_out, opened = Encoder.lay_out, Image.open

        def counted(encoder: Encoder, record: Record) -> Any:
            self.rows += 1
            return lay_out(encoder, record)

        def looked(*arguments: Any, **more: Any) -> Any:
            self.images += 1
            return opened(*arguments, **more)

        monkeypatch.setattr(Encoder, "lay_out", counted)
        monkeypatch.setattr(Image, "open", looked)

    def since(self) -> tuple[int, int]:
        found = self.rows, self.images
        self.rows = self.images = 0
        return found


def two_a_block(runs: int) -> int:
    """Passes of a micro-step of stage2 with k = 2."""
    return 2 * runs + 1
