"""The height of the allocator in a micro-step against what `mirage-ds plan` computes (memory.py has the share)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu.memory import LEAST, MOST, planned
from gpu.packed import STAGES, Rows, ready
from gpu.watch import height_on_cuda

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# About 30,000 tokens: hundreds of MB, beside which the allocator's steps of 2 MB are small.
TIMES = {"sft": 20, "stage1": 40, "stage2": 20}
CHUNK_BYTES = 16 << 20


@pytest.mark.parametrize("stage", STAGES)
# SDPA on a GPU takes one of several ways, with memory of their own; no run there chooses it.
@pytest.mark.parametrize("backend", ["flash", "torch_varlen"])
def test_a_micro_step_takes_what_was_planned(backend: str, stage: str, nano: Path, mixed: Path) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed: this back end alone is left out")
    rows = Rows(nano, mixed, stage, times=TIMES[stage])
    made = ready(rows, CUDA, torch.bfloat16, backend, loss_chunk_bytes=CHUNK_BYTES)
    # As ZeRO does: a gradient goes away as soon as it is complete.
    for parameter in made.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    # Libraries take their workspaces in the first step and keep them.
    made.step()
    found = height_on_cuda(made.step)
    computed = planned(rows, made.batch, 2, backend, CHUNK_BYTES, "cuda")
    print(f"{backend} {stage}: {found:,} bytes, planned {computed.total:,} ({computed.phase})")
    assert LEAST * computed.total <= found <= MOST * computed.total
