"""Offloading to the host's memory: the refusal at its edge, what Linux says is free."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirage_ds.engine import offload, setup
from mirage_ds.engine.offload import check_offload, memory_to_be_had
from mirage_ds.errors import UserError

JSON = Path("offload.json")
RANKS = 2


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (offload, setup):
        monkeypatch.setattr(module, "everyone", lambda own, world: own * world.size)
    monkeypatch.setattr(offload.socket, "gethostname", lambda: "node1")
    world: Any = SimpleNamespace(size=RANKS, local_rank=0)
    monkeypatch.setattr(offload, "memory_to_be_had", lambda: RANKS * 10**9)
    check_offload(10**9, JSON, world)
    with pytest.raises(UserError) as caught:
        check_offload(10**9 + 1, JSON, world)
    assert "takes 1 GB of memory a rank, 2 GB for the 2 rank(s) of node1, and 2 GB are free" in str(caught.value)
    # Nothing is offloaded: nobody asks.
    monkeypatch.setattr(offload, "memory_to_be_had", lambda: 0)
    check_offload(0, JSON, world)


def test_memory_as_linux_says_it(tmp_path: Path) -> None:
    assert memory_to_be_had(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory_to_be_had(tmp_path) == 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_to_be_had(tmp_path) > 1 << 20
