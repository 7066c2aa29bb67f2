"""The three back ends in bf16 against dense attention in float32 (attention.py has the bounds), and in decoding."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.attention import HEADS, LONG, worst
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.evaluate.prompts import prompts_of
from mirage_ds.model import kv_cache
from mirage_ds.model.choose import Chooser
from mirage_ds.model.generate import generate
from mirage_ds.model.load import load_model
from mirage_ds.model.slots import Limits, latent_tokens

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


@pytest.mark.parametrize("backend", ["flash", "torch_varlen"])
def test_decoding_over_blocks_is_that_of_plain_products_and_waits_once_a_token(
    backend: str, nano: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed: this back end alone is left out")
    device = torch.device("cuda")
    loaded = load_model(nano, stage="sft", dtype=torch.bfloat16, device=device, checkpointing=False)
    loaded.model.eval().how.attention = backend
    encoder = load_encoder([str(nano)], ImageFinder.beside(mixed, None), "sft", 1)
    samples = [encoder.encode_prompt(record, row) for row, record in enumerate(scan(mixed)[0][:6])]
    tokens, waits = latent_tokens(encoder)._replace(stops=()), []

    def forced(logits: torch.Tensor, turns: Any) -> torch.Tensor:
        # Beyond the first page, and the same tokens on both ways.
        return torch.full_like(logits[:, 0], 17 + turns[0].step % 50, dtype=torch.long)

    def decoded(choose: Chooser = forced) -> torch.Tensor:
        prompts = prompts_of(loaded.model, loaded.tower, encoder, samples)
        made = generate(loaded.model, prompts, tokens, Limits(300), choose, trace=True)
        return torch.stack([state for one in made for state in one.hidden])

    def counted(logits: torch.Tensor, turns: Any) -> torch.Tensor:
        waits.append(len(seen))
        return forced(logits, turns)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = decoded(counted)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert max(b - a for a, b in pairwise(waits)) == 1
    monkeypatch.setattr(kv_cache, "kernel_of", lambda model: None)
    torch.testing.assert_close(found.float(), decoded().float(), rtol=0.05, atol=0.05)
