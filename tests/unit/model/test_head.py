"""The loss head: its parts, and a bf16 weight's gradient.

M labelled positions, C of them in a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.head import weight_errors
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_ds.model import head
from mirage_ds.model.chunks import CPU_BYTES, chunk_budget, divide, even


class Gpu(TorchDispatchMode):
    """Gives a CPU the product of bf16 into float32 that only a GPU has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.mm.dtype, torch.ops.aten.mm.dtype_out):
            return func(*args, **(kwargs or {}))
        product = args[0].float() @ args[1].float()
        return product if func == torch.ops.aten.mm.dtype else kwargs["out"].copy_(product)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
# Of 1,480 positions: 37 chunks, 10, and all at once.
@pytest.mark.parametrize("rows", [40, 148, 1480])
def test_a_bf16_weights_gradient_is_rounded_once(
    rows: int, products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU's products and with a CPU's; tests/gpu/test_head.py asks a GPU itself."""
    monkeypatch.setattr(head, "products_of", lambda weight: products)
    with Gpu():
        found, whole = weight_errors("cpu", rows)
    assert found <= 1.05 * whole


@pytest.mark.parametrize(
    ("count", "most", "tile", "wanted"),
    [
        # One more than fits twice: three alike, in place of two and a sliver.
        (2049, 1024, 128, 768),
        (1638, 1092, 128, 896),
        # All at once; less than a tile; a CPU.
        (100, 1024, 128, 100),
        (1000, 100, 128, 100),
        (256, 220, 1, 128),
        # A budget too small for one.
        (5, 0, 128, 1),
    ],
)
def test_parts_are_even_and_whole_tiles(count: int, most: int, tile: int, wanted: int) -> None:
    assert even(count, most, tile) == wanted


def test_a_gpus_chunks_grow_with_its_memory_and_a_cpus_are_as_ever() -> None:
    assert chunk_budget(0) == CPU_BYTES == 256 << 20
    sevens = {gb: divide(16384, 3584, 152064, chunk_budget(gb * 1e9), True) for gb in (40, 80, 141)}
    assert {gb: rows for gb, (rows, _) in sevens.items()} == {40: 256, 80: 512, 141: 896}
    # A slice holds no more than a chunk may.
    assert all(words * (6 * 16384 + 2 * 3584) <= gb * 1e9 / 128 for gb, (_, words) in sevens.items())
