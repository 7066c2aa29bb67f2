"""Packed attention against an explicit softmax, query by query, in float64.

Tq query tokens, Tk key tokens, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional

from mirage_ds.errors import UserError
from mirage_ds.model.attention import BACKENDS, Packed, choose_backend, packed_attention, varlen_attention

D = 16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# (queries, keys) of each sample of one packed call.
LENGTHS = {
    "whole rows": [(7, 7), (1, 1), (12, 12)],
    "fewer queries than keys": [(3, 9), (5, 6), (2, 11)],
    "one query each": [(1, 8), (1, 1), (1, 5)],
    "mixed": [(1, 6), (4, 4), (3, 10), (1, 1)],
}


def softmax_loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list, scale: float) -> torch.Tensor:
    """Each query of each head alone; query i of n sees the first (keys − n + i + 1) keys of its sample."""
    q, k, v = q.double(), k.double(), v.double()
    share = q.shape[1] // k.shape[1]
    rows, q_at, k_at = [], 0, 0
    for queries, keys in lengths:
        for i in range(queries):
            seen = slice(k_at, k_at + keys - queries + i + 1)
            heads = []
            for head in range(q.shape[1]):
                scores = (k[seen, head // share] @ q[q_at + i, head]) * scale
                weights = (scores - scores.max()).exp()
                heads.append((weights / weights.sum()) @ v[seen, head // share])
            rows.append(torch.stack(heads))
        q_at, k_at = q_at + queries, k_at + keys
    return torch.stack(rows)


def top_left(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """SDPA with its own `is_causal`, which aligns top-left: what must not pass."""
    parts = zip(
        q.split(cu_q.diff().tolist()), k.split(cu_k.diff().tolist()), v.split(cu_k.diff().tolist()), strict=True
    )
    heads = [[x.transpose(0, 1)[None] for x in part] for part in parts]
    made = [
        functional.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in heads
    ]
    return torch.cat([one[0].transpose(0, 1) for one in made])


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def tensors(lengths: list, q_heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    queries, keys = (sum(column) for column in zip(*lengths, strict=True))
    return (
        torch.randn(queries, q_heads, D, requires_grad=True),
        torch.randn(keys, kv_heads, D, requires_grad=True),
        torch.randn(keys, kv_heads, D, requires_grad=True),
    )


def check(backend: str, lengths: list, q_heads: int, kv_heads: int) -> None:
    q, k, v = tensors(lengths, q_heads, kv_heads)
    queries, keys = (list(column) for column in zip(*lengths, strict=True))
    output = varlen_attention(
        q, k, v, cumulative(queries), cumulative(keys), max(queries), max(keys), backend=backend, scale=0.3
    )
    expected = softmax_loop(q, k, v, lengths, 0.3)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(output)
    got = torch.autograd.grad((output * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight.double()).sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", LENGTHS)
def test_sdpa_equals_softmax_loop_with_gradients(name: str, q_heads: int, kv_heads: int) -> None:
    check("sdpa", LENGTHS[name], q_heads, kv_heads)


def test_top_left_mask_passes_on_whole_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "top_left", top_left)
    check("top_left", LENGTHS["whole rows"], 4, 2)
    for name in ("fewer queries than keys", "one query each", "mixed"):
        with pytest.raises(AssertionError):
            check("top_left", LENGTHS[name], 4, 2)


def test_scale_defaults_to_one_over_root_of_head_width() -> None:
    lengths = [(3, 5)]
    q, k, v = tensors(lengths, 4, 2)
    output = varlen_attention(q, k, v, cumulative([3]), cumulative([5]), 3, 5)
    torch.testing.assert_close(output.double(), softmax_loop(q, k, v, lengths, 0.25), rtol=0, atol=1e-5)


def test_packed_attention_puts_past_and_own_keys_in_order() -> None:
    # Two samples over three passes. Pass 0 makes a0 a1 b0, pass 1 a2 b1, pass 2 (the one called) a3 a4 b2 b3.
    torch.manual_seed(1)
    k, v = torch.randn(9, 2, D), torch.randn(9, 2, D)
    q = torch.randn(4, 4, D)
    # In the order a0 … a4 b0 … b3 these are the rows that each pass makes.
    made = [[0, 1, 5], [2, 6], [3, 4, 7, 8]]
    order = torch.tensor([0, 1, 3, 5, 6, 2, 4, 7, 8])
    receives: list = []
    packed = Packed(
        past=[(k[rows], v[rows]) for rows in made[:2]],
        made=receives,
        keys=order,
        cu_q=cumulative([2, 2]),
        cu_k=cumulative([5, 4]),
        max_q=2,
        max_k=5,
        backend="sdpa",
    )
    own_k, own_v = k[made[2]], v[made[2]]
    heads_first = [x.transpose(0, 1)[None] for x in (q, own_k, own_v)]
    output, weights = packed_attention(torch.nn.Module(), *heads_first, None, 0.3, packed, dropout=0.0)
    assert weights is None
    expected = softmax_loop(q, k, v, [(2, 5), (2, 4)], 0.3)
    torch.testing.assert_close(output[0].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(receives[0][0], own_k)
    assert torch.equal(receives[0][1], own_v)


def test_packed_attention_without_order_takes_keys_as_made() -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(5, 4, D), torch.randn(5, 2, D), torch.randn(5, 2, D)
    packed = Packed([], [], None, cumulative([3, 2]), cumulative([3, 2]), 3, 3, "sdpa")
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    output, _ = packed_attention(torch.nn.Module(), *heads_first, None, 0.3, packed)
    expected = softmax_loop(q, k, v, [(3, 3), (2, 2)], 0.3)
    torch.testing.assert_close(output[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "device", "installed", "chosen"),
    [
        ("auto", CPU, False, "sdpa"),
        ("auto", CPU, True, "sdpa"),
        ("auto", CUDA, False, "torch_varlen"),
        ("auto", CUDA, True, "flash"),
        ("sdpa", CPU, False, "sdpa"),
        ("sdpa", CUDA, True, "sdpa"),
        ("flash", CUDA, True, "flash"),
        ("torch_varlen", CUDA, False, "torch_varlen"),
    ],
)
def test_backend_chosen(name, device, installed, chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object() if installed else None)
    assert choose_backend(name, device) == chosen


@pytest.mark.parametrize(
    ("name", "device", "installed", "sentence"),
    [
        (
            "flash",
            CUDA,
            False,
            "--attention flash: flash-attn is not installed; pip install --no-build-isolation "
            '"mirage-ds[flash]", or use --attention auto',
        ),
        ("flash", CPU, True, "--attention flash needs a CUDA GPU and this run is on cpu; use --attention sdpa"),
        (
            "torch_varlen",
            CPU,
            False,
            "--attention torch_varlen needs a CUDA GPU and this run is on cpu; use --attention sdpa",
        ),
    ],
)
def test_backend_refused_in_one_sentence(name, device, installed, sentence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object() if installed else None)
    with pytest.raises(UserError) as refused:
        choose_backend(name, device)
    assert str(refused.value) == sentence


def test_queries_and_keys_take_the_dtype_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    # As under torch_autocast: rotary positions make float32 of q and k.
    lengths = LENGTHS["mixed"]
    cu_q, cu_k = (cumulative([pair[side] for pair in lengths]) for side in (0, 1))
    q = torch.randn(int(cu_q[-1]), 4, D, generator=torch.Generator().manual_seed(1))
    k, v = torch.randn(2, int(cu_k[-1]), 2, D, generator=torch.Generator().manual_seed(2))
    seen = []
    real = BACKENDS["sdpa"]
    monkeypatch.setitem(BACKENDS, "sdpa", lambda *args: seen.append([x.dtype for x in args[:3]]) or real(*args))
    made = varlen_attention(q, k, v.bfloat16(), cu_q, cu_k, 4, 10)
    assert seen == [[torch.bfloat16] * 3]
    assert made.dtype == torch.bfloat16
    assert made.equal(varlen_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu_q, cu_k, 4, 10))
