"""A back end in bf16 against dense softmax attention in float32, each number with its own bound.

Tq query tokens, Tk key tokens, Hq query heads, Hkv key heads, D head width, N samples.

The bound counts roundings to bf16, u = 2⁻⁸ each, and follows them through the formulas. A kernel takes exact bf16
inputs, multiplies and adds in float32, and rounds
  to bf16 before the second product   the weights P: an error of at most u P, so u P |v| in the output
  the output, as it is returned       u |out|
  dS before its two products          u |dS|
  each gradient, as it is returned    u |gradient|; of keys and values once a query head, and once their sum; where a
                                      group's heads are added one by one in bf16, once an addition.
Backward takes Σ dO · out from the rounded output, whose error comes back in dS, times P. Errors of the second order and
float32's own are in ROOM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mirage_ds.model.attention import Ends, varlen_attention

ROUNDING = torch.finfo(torch.bfloat16).eps / 2
ROOM = 1.1
# Where a number is zero by cancellation, what float32 leaves of it.
FLOOR = 1e-6

Lengths = Sequence[tuple[int, int]]
# They sum a group's heads in float32; SDPA repeats keys and values, and the gradient of that adds in bf16.
SUM_IN_FLOAT32 = ("flash", "torch_varlen")
# (queries, keys) of each sample, as the passes of stage2 have them.
SHORT: dict[str, Lengths] = {
    "pass 0": [(7, 7), (1, 1), (21, 21), (12, 12)],
    "a latent alone": [(1, 8), (1, 2), (1, 22), (1, 13)],
    "last pass": [(9, 17), (4, 6), (11, 33), (2, 15)],
    "mixed": [(1, 9), (6, 6), (5, 20), (1, 1)],
}
# Long enough for several blocks of a kernel.
LONG: dict[str, Lengths] = {
    "pass 0": [(257, 257), (1, 1), (130, 130), (64, 64)],
    "a latent alone": [(1, 258), (1, 2), (1, 131), (1, 65)],
    "last pass": [(129, 386), (3, 5), (200, 330), (65, 129)],
    "one row": [(300, 300)],
    "mixed": [(1, 259), (66, 66), (40, 170), (1, 1)],
}
# (Hq, Hkv, D): nano, the 7B, one key head, no groups.
HEADS = [(4, 2, 32), (28, 4, 128), (6, 1, 64), (4, 4, 16)]


class Attended(NamedTuple):
    """Output and gradients of q, k and v, or a bound on the error of each."""

    out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def _visible(lengths: Lengths) -> torch.Tensor:
    """Which keys a query sees: (Tq, Tk)."""
    blocks = [torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) for queries, keys in lengths]
    return torch.block_diag(*blocks).bool()


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    by_out: torch.Tensor,
    lengths: Lengths,
    scale: float,
    one_by_one: bool,
) -> tuple[Attended, Attended]:
    """Attend densely in float32; return the values and the bounds.

    Args:
        q: (Tq, Hq, D); k, v: (Tk, Hkv, D); by_out: (Tq, Hq, D), the output's gradient; all bf16.
        one_by_one: heads of a group are added in bf16.
    """
    share, groups = q.shape[1] // k.shape[1], (k.shape[1], q.shape[1] // k.shape[1])
    q, g = (x.float().transpose(0, 1) for x in (q, by_out))
    k, v = (x.float().transpose(0, 1).repeat_interleave(share, dim=0) for x in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~_visible(lengths), -torch.inf)
    p = scores.softmax(-1)
    out = p @ v
    by_scores = p * (g @ v.mT - (g * out).sum(-1, keepdim=True))
    by_q, by_k, by_v = scale * by_scores @ k, scale * by_scores.mT @ q, p.mT @ g

    u = ROUNDING
    of_out = u * (out.abs() + p @ v.abs())
    of_scores = u * by_scores.abs() + p * (g.abs() * of_out).sum(-1, keepdim=True)
    of_q = scale * of_scores @ k.abs() + u * by_q.abs()
    of_k = scale * of_scores.mT @ q.abs() + u * by_k.abs()
    of_v = u * (p.mT @ g.abs() + by_v.abs())

    def summed(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, groups).sum(1)

    def of_sum(x: torch.Tensor) -> torch.Tensor:
        return u * ((share - 1) * summed(x.abs()) if one_by_one else summed(x).abs())

    values = Attended(out, by_q, summed(by_k), summed(by_v))
    bounds = Attended(of_out, of_q, summed(of_k) + of_sum(by_k), summed(of_v) + of_sum(by_v))
    return (
        Attended(*(x.transpose(0, 1) for x in values)),
        Attended(*(ROOM * x.transpose(0, 1) + FLOOR for x in bounds)),
    )


def worst(device: torch.device, backend: str, lengths: Lengths, heads: tuple[int, int, int]) -> dict[str, float]:
    """Errors of a back end in bf16 over their bounds, the largest of output and each gradient; above 1 is a fault.

    Args:
        backend: a key of model.attention.BACKENDS.
        heads: (Hq, Hkv, D).
    """
    generator = torch.Generator().manual_seed(0)
    queries, keys = zip(*lengths, strict=True)
    query_heads, key_heads, width = heads

    def drawn(tokens: int, count: int) -> torch.Tensor:
        return torch.randn(tokens, count, width, generator=generator).bfloat16()

    q, by_out = drawn(sum(queries), query_heads), drawn(sum(queries), query_heads)
    k, v = drawn(sum(keys), key_heads), drawn(sum(keys), key_heads)
    scale = width**-0.5
    one_by_one = backend not in SUM_IN_FLOAT32
    wanted, bounds = reference(q, k, v, by_out, lengths, scale, one_by_one)
    own = [x.to(device).requires_grad_() for x in (q, k, v)]
    cu_q, cu_k = (
        torch.tensor([0, *column], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        for column in (queries, keys)
    )
    out = varlen_attention(*own, Ends(cu_q, cu_k, max(queries), max(keys)), backend, scale)
    got = Attended(out, *torch.autograd.grad(out, own, by_out.to(device)))
    assert all(x.dtype == torch.bfloat16 for x in got)
    return {
        name: float(((x.detach().cpu().float() - y).abs() / bound).max())
        for name, x, y, bound in zip(Attended._fields, got, wanted, bounds, strict=True)
    }
