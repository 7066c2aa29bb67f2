"""The three back ends in bf16 against dense attention in float32 (attention.py has the bounds)."""

from __future__ import annotations

import pytest
import torch

from gpu.attention import HEADS, LONG, worst

pytestmark = pytest.mark.gpu


# And the narrowest and widest heads that the kernels take.
@pytest.mark.parametrize("heads", [*HEADS, (4, 2, 8), (4, 2, 256)])
@pytest.mark.parametrize("lengths", LONG)
@pytest.mark.parametrize("backend", ["flash", "torch_varlen", "sdpa"])
def test_a_back_end_errs_no_more_than_bf16_rounds(backend: str, lengths: str, heads: tuple[int, int, int]) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed: this back end alone is left out")
    found = worst(torch.device("cuda"), backend, LONG[lengths], heads)
    assert max(found.values()) <= 1, found
