"""Liger-Kernel's norms and MLPs on a GPU against transformers' own (tests/slow/test_liger.py: on a CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu.packed import CPU, STAGES, Rows, drift, outcome, ready

pytestmark = pytest.mark.gpu
# As test_forward.py: sums in another order; bf16 against the CPU's own drift in bf16.
FP32, TIMES = 1e-4, 3


@pytest.mark.parametrize("stage", STAGES)
def test_kernels_drift_no_more_than_bf16_does(stage: str, nano: Path, mixed: Path) -> None:
    pytest.importorskip("liger_kernel", reason="the extra liger is not installed")
    rows, cuda = Rows(nano, mixed, stage), torch.device("cuda")
    exact, rounded = (outcome(ready(rows, CPU, dtype, "sdpa")) for dtype in (torch.float32, torch.bfloat16))
    full, half = (
        drift(outcome(ready(rows, cuda, dtype, "sdpa", kernels="liger")), exact)
        for dtype in (torch.float32, torch.bfloat16)
    )
    print(f"{stage}: {full}, in bf16 {half}")
    assert max(full) <= FP32
    assert all(one <= TIMES * other for one, other in zip(half, drift(rounded, exact), strict=True))
