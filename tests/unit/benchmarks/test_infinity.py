"""The arithmetic of benchmarks/infinity.py: what a depth takes, and the depth that fits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.infinity import SPARE_DISK, SPARE_MEMORY, Needs, deepest, groups_of, needs, used
from mirage_ds.plan.formulas import Sizes, sizes
from mirage_ds.plan.shape import read_shape

# q and o, k and v, the MLP; biases of q, k and v, two norms.
LAYER = 2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 11_008 + (2048 + 2 * 256) + 2 * 2048
EMBEDDING = 151_936 * 2048
PLENTY = Needs(10**12, 10**12)


@pytest.fixture(scope="module")
def model() -> Sizes:
    return sizes(read_shape("qwen2.5-vl-3b"))


@pytest.mark.parametrize(("dtype", "b"), [("bf16", 2), ("fp32", 4)])
def test_the_3b_by_hand(model: Sizes, dtype: str, b: int) -> None:
    assert model.layer + model.vectors == LAYER
    assert model.text == 36 * LAYER + EMBEDDING + 2048
    assert [sum(group) for group in groups_of(model)] == [model.layers * model.layer + EMBEDDING, 36 * 6656 + 2048]
    wanted = needs(model, dtype)
    # 16 + b bytes an element on the disk; vectors stay in memory, and rounding to whole units is below a megabyte.
    assert wanted.disk - SPARE_DISK == pytest.approx((16 + b) * model.text, rel=1e-3)
    # 2 buffers of the embedding, its copy to write from, 4 buffers in fp32; b bytes of sums and b of gradients an
    # element; the embedding whole, its gradient, and that in fp32.
    held = (3 * b + 4 * 4 + 2 * b + 4) * EMBEDDING + 2 * b * model.text
    assert wanted.memory - SPARE_MEMORY == pytest.approx(held, rel=1e-3)


def test_the_depth_that_fits(model: Sizes) -> None:
    for depth in (1, 20, 36):
        just = needs(model._replace(layers=depth), "bf16")
        assert deepest(model, 36, just, "bf16") == depth
        assert deepest(model, 36, PLENTY._replace(disk=just.disk), "bf16") == depth
        assert deepest(model, 36, PLENTY._replace(disk=just.disk - 1), "bf16") == depth - 1
        assert deepest(model, 36, PLENTY._replace(memory=just.memory - 1), "bf16") == depth - 1
    assert deepest(model, 5, PLENTY, "bf16") == 5


def test_used_counts_blocks_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.swp").write_bytes(os.urandom(1 << 20))
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 30)
    assert 1 << 20 <= used(tmp_path) < 2 << 20


def test_json_is_resolvable(model: Sizes, tmp_path: Path) -> None:
    from benchmarks.infinity import ds_json
    from mirage_ds.engine import ds_config
    from mirage_ds.engine.offload import Disk, Host, faults
    from mirage_ds.engine.offload_bytes import read_keys

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_json(str(tmp_path), model, "bf16")))
    keys = read_keys(ds_config.read_json(path))
    host = Host("here", 1, 10**12, None, None, [Disk(tmp_path, None, 1, 10**12)])
    assert faults(keys, path, groups_of(model), model.matrices, 1, host, checkpoints=False) == []
