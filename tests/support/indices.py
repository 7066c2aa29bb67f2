"""What the tests of the index share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from mirage_ds.data.encode import Encoder
from mirage_ds.data.record import Record

Make = Callable[..., Encoder]

BREAK: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 3 // 4],
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


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
