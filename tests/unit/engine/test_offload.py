"""Offloading to the host's memory: what it takes there by hand, the refusal at its edge, what Linux says is free."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirage_ds.engine import offload, setup
from mirage_ds.engine.offload import check_offload, host_bytes, memory_to_be_had
from mirage_ds.errors import UserError

JSON = Path("offload.json")
# One of them odd in size: two ranks hold 1,500,001 and 64 elements.
ELEMENTS, RANKS = [3_000_001, 128], 2
OWN = 1_500_001 + 64


def values(*offloaded: str, stage: int = 3, **changed: Any) -> dict[str, Any]:
    blocks = {f"offload_{name}": {"device": "cpu"} for name in offloaded}
    return {"zero_optimization": {"stage": stage, **blocks}, **changed}


BF16 = {"bf16": {"enabled": True}}
LOW = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}


@pytest.mark.parametrize(
    ("json", "each"),
    [
        (values(), 0),
        (values("param"), 4),
        # Sums, master weights, two moments, the gradient that the optimizer steps with.
        (values("optimizer"), 4 + 12 + 4),
        (values("optimizer", stage=2), 4 + 12),
        (values("param", "optimizer"), 4 + 4 + 12 + 4),
        (values("param", "optimizer", **BF16), 2 + 2 + 12 + 4),
        (values("param", "optimizer", **BF16, data_types={"grad_accum_dtype": "fp32"}), 2 + 4 + 12 + 4),
        (values("param", "optimizer", **LOW), 2 + 2 + 6 + 2),
    ],
)
def test_bytes_by_hand(json: dict[str, Any], each: int) -> None:
    assert host_bytes(json, ELEMENTS, RANKS) == each * OWN


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (offload, setup):
        monkeypatch.setattr(module, "everyone", lambda own, world: own * world.size)
    monkeypatch.setattr(offload.socket, "gethostname", lambda: "node1")
    world: Any = SimpleNamespace(size=RANKS, local_rank=0)
    json = values("param", "optimizer")
    needed = RANKS * host_bytes(json, ELEMENTS, RANKS)
    monkeypatch.setattr(offload, "memory_to_be_had", lambda: needed)
    check_offload(json, JSON, ELEMENTS, world)
    monkeypatch.setattr(offload, "memory_to_be_had", lambda: needed - 1)
    with pytest.raises(UserError) as caught:
        check_offload(json, JSON, ELEMENTS, world)
    assert f"{needed / 1e6:.1f} MB for the 2 rank(s) of node1" in str(caught.value)
    # Nothing is offloaded: nobody asks.
    monkeypatch.setattr(offload, "memory_to_be_had", lambda: 0)
    check_offload(values(), JSON, ELEMENTS, world)


def test_memory_as_linux_says_it(tmp_path: Path) -> None:
    assert memory_to_be_had(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory_to_be_had(tmp_path) == 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_to_be_had(tmp_path) > 1 << 20
