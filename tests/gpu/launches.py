"""Kernels that the pass of a single latent starts: its price on a GPU, where its arithmetic is next to nothing.

L layers, k latents a run, Tq query tokens, Tk key tokens, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional

from gpu.packed import Rows, ready
from gpu.watch import launches
from mirage_ds.model.attention import Ends

# Operators of a decoder layer's forward over one pass in bf16 (transformers 5.23), one kernel each.
NORM = 8  # to float32, square, mean, + ε, 1 / √, product, to bf16, product with the weight
ROTARY = 5  # x cos, negated half, both halves joined, its product with sin, sum
LAYER = {
    "norms": 2 * NORM,
    "q, k, v with their biases": 3,
    "rotary positions of q and k": 2 * ROTARY,
    "keys and values of all passes joined": 2,
    "and brought into the order of the rows": 2,
    "attention": 1,
    "its projection": 1,
    "sums with the residual": 2,
    "gate, up, down, activation, product": 5,
}
# Outside the layers.
PASS = {
    "embeddings, fed-back states and their places": 3,
    "cos and sin": 2,
    "final norm": NORM,
    "states before labels": 1,
}
# A product may clear a workspace and sum its parts up, attention may have such steps before and after it, and an
# operator outside the layers may copy before it works.
PRODUCTS, MORE_A_PRODUCT, MORE_OF_ATTENTION = 7, 2, 6


def operators(layers: int) -> int:
    """Operators of the forward of a one-token pass."""
    return layers * sum(LAYER.values()) + sum(PASS.values())


def most_launches(layers: int) -> int:
    """Bound on the launches of the forward of a one-token pass on a GPU."""
    return layers * (sum(LAYER.values()) + PRODUCTS * MORE_A_PRODUCT + MORE_OF_ATTENTION) + 2 * sum(PASS.values())


# Forward, recomputation and gradients together: launches on a GPU over operators counted on the CPU. Many operators of
# backward clear or copy a tensor first.
MOST_A_OPERATOR = 2.0


def one_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: Ends, scale: float) -> torch.Tensor:
    """A back end of one operator, as a kernel is, for the CPU: one row, and no causal mask where it begins later.

    Only for counting.
    """
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    causal = ends.max_q == ends.max_k > 1
    out = functional.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def of_one_pass(
    model: Path, data: Path, device: torch.device, backend: str, what: Literal["loss", "step"], ks: tuple[int, int]
) -> float:
    """Count what one more pass of a single latent starts, from runs of k and of more latents.

    Args:
        backend: a key of model.attention.BACKENDS.
        what: "loss", the forward, or "step", with recomputation and gradients.
        ks: the two k.
    """
    counts: list[Counter[str]] = []
    for k in ks:
        made: Any = ready(Rows(model, data, "stage2", k, chosen=(0,)), device, torch.bfloat16, backend)
        # The first step makes the gradients, to which others are added, and starts libraries up.
        made.step()
        counts.append(launches(device, getattr(made, what)))
    few, many = (sum(count.values()) for count in counts)
    return (many - few) / (ks[1] - ks[0])
