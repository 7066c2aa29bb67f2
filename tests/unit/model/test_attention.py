"""Packed attention against an explicit softmax, query by query, in float64.

Tq query tokens, Tk key tokens, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mirage_ds.errors import UserError
from mirage_ds.model.attention import (
    BACKENDS,
    Ends,
    Packed,
    choose_backend,
    flash_fault,
    packed_attention,
    varlen_attention,
)

D = 16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# (queries, keys) of each sample of one packed call.
LENGTHS = {
    "whole rows": [(7, 7), (1, 1), (12, 12)],
    "fewer queries than keys": [(3, 9), (5, 6), (2, 11)],
    "one query each": [(1, 8), (1, 1), (1, 5)],
    "mixed": [(1, 6), (4, 4), (3, 10), (1, 1)],
}


def softmax_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list, scale: float, causal: bool = True
) -> torch.Tensor:
    """Each query of each head alone; query i of n sees the first (keys − n + i + 1) keys of its sample, or all."""
    q, k, v = q.double(), k.double(), v.double()
    share = q.shape[1] // k.shape[1]
    rows, q_at, k_at = [], 0, 0
    for queries, keys in lengths:
        for i in range(queries):
            seen = slice(k_at, k_at + keys - (queries - i - 1 if causal else 0))
            heads = []
            for head in range(q.shape[1]):
                scores = (k[seen, head // share] @ q[q_at + i, head]) * scale
                weights = (scores - scores.max()).exp()
                heads.append((weights / weights.sum()) @ v[seen, head // share])
            rows.append(torch.stack(heads))
        q_at, k_at = q_at + queries, k_at + keys
    return torch.stack(rows)


def top_left(q, k, v, ends, scale):
    """SDPA with its own `is_causal`, which aligns top-left: what must not pass."""
    parts = zip(
        *(x.split(cu.diff().tolist()) for x, cu in ((q, ends.cu_q), (k, ends.cu_k), (v, ends.cu_k))), strict=True
    )
    heads = [[x.transpose(0, 1)[None] for x in part] for part in parts]
    made = [
        functional.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in heads
    ]
    return torch.cat([one[0].transpose(0, 1) for one in made])


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def ends_of(queries: list[int], keys: list[int]) -> Ends:
    return Ends(cumulative(queries), cumulative(keys), max(queries), max(keys))


def tensors(lengths: list, q_heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    queries, keys = (sum(column) for column in zip(*lengths, strict=True))
    return (
        torch.randn(queries, q_heads, D, requires_grad=True),
        torch.randn(keys, kv_heads, D, requires_grad=True),
        torch.randn(keys, kv_heads, D, requires_grad=True),
    )


def check(backend: str, lengths: list, q_heads: int, kv_heads: int, causal: bool = True) -> None:
    q, k, v = tensors(lengths, q_heads, kv_heads)
    queries, keys = (list(column) for column in zip(*lengths, strict=True))
    output = varlen_attention(q, k, v, ends_of(queries, keys)._replace(causal=causal), backend, 0.3)
    expected = softmax_loop(q, k, v, lengths, 0.3, causal)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(output)
    got = torch.autograd.grad((output * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight.double()).sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(("q_heads", "kv_heads", "causal"), [(4, 4, True), (4, 2, True), (6, 1, True), (4, 4, False)])
@pytest.mark.parametrize("name", LENGTHS)
def test_sdpa_equals_softmax_loop_with_gradients(name: str, q_heads: int, kv_heads: int, causal: bool) -> None:
    check("sdpa", LENGTHS[name], q_heads, kv_heads, causal)


def test_top_left_mask_passes_on_whole_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "top_left", top_left)
    check("top_left", LENGTHS["whole rows"], 4, 2)
    for name in ("fewer queries than keys", "one query each", "mixed"):
        with pytest.raises(AssertionError):
            check("top_left", LENGTHS[name], 4, 2)


def test_scale_defaults_to_one_over_root_of_head_width() -> None:
    lengths = [(3, 5)]
    q, k, v = tensors(lengths, 4, 2)
    output = varlen_attention(q, k, v, ends_of([3], [5]))
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
        ends=ends_of([2, 2], [5, 4]),
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
    packed = Packed([], [], None, ends_of([3, 2], [3, 2]), "sdpa")
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    output, _ = packed_attention(torch.nn.Module(), *heads_first, None, 0.3, packed)
    expected = softmax_loop(q, k, v, [(3, 3), (2, 2)], 0.3)
    torch.testing.assert_close(output[0].double(), expected, rtol=0, atol=1e-5)


HALF, FULL = torch.bfloat16, torch.float32
WIDE = 128


@pytest.fixture
def flash_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str | None], None]]:
    """A flash_attn whose file holds this text; None for none at all."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str | None) -> None:
        if text is not None:
            (tmp_path / "flash_attn.py").write_text(text)
        flash_fault.cache_clear()

    yield write
    flash_fault.cache_clear()


@pytest.mark.parametrize(
    ("name", "device", "wheel", "dtype", "width", "chosen"),
    [
        ("auto", CPU, None, FULL, WIDE, "sdpa"),
        ("auto", CPU, "", HALF, WIDE, "sdpa"),
        ("auto", CUDA, None, HALF, WIDE, "torch_varlen"),
        ("auto", CUDA, "", HALF, WIDE, "flash"),
        ("auto", CUDA, "", torch.float16, 256, "flash"),
        # A wheel built for another torch is found, and cannot be imported.
        ("auto", CUDA, "raise ImportError('undefined symbol: _ZN3c10')", HALF, WIDE, "torch_varlen"),
        ("auto", CUDA, "import a_part_of_it", HALF, WIDE, "torch_varlen"),
        ("auto", CUDA, "", FULL, WIDE, "sdpa"),
        ("auto", CUDA, None, FULL, WIDE, "sdpa"),
        ("auto", CUDA, "", torch.float64, WIDE, "sdpa"),
        ("auto", CUDA, "", HALF, 20, "sdpa"),
        ("auto", CUDA, None, HALF, 264, "sdpa"),
        ("sdpa", CPU, None, FULL, WIDE, "sdpa"),
        ("sdpa", CUDA, "", HALF, WIDE, "sdpa"),
        ("flash", CUDA, "", HALF, WIDE, "flash"),
        ("torch_varlen", CUDA, None, HALF, 8, "torch_varlen"),
    ],
)
def test_backend_chosen(name, device, wheel, dtype, width, chosen, flash_wheel: Callable[[str | None], None]) -> None:
    flash_wheel(wheel)
    assert choose_backend(name, device, dtype, width) == chosen


INSTALL = '; pip install --no-build-isolation "mirage-ds[flash]", or use --attention auto'
NO_GPU = "needs a CUDA GPU and this run is on cpu; use --attention sdpa"
IN_FULL = "takes bfloat16 and float16 and this model computes in float32; use --attention sdpa"
TOO_WIDE = "takes head widths that are multiples of 8 up to 256 and this model's is 320; use --attention sdpa"


@pytest.mark.parametrize(
    ("name", "device", "wheel", "dtype", "width", "said"),
    [
        ("flash", CUDA, None, HALF, WIDE, f": flash-attn is not installed{INSTALL}"),
        (
            *("flash", CUDA, "raise ImportError('undefined symbol: _ZN3c10')", HALF, WIDE),
            f": flash-attn cannot be imported (ImportError: undefined symbol: _ZN3c10){INSTALL}",
        ),
        (
            *("flash", CUDA, "import a_part_of_it", HALF, WIDE),
            f": flash-attn cannot be imported (ModuleNotFoundError: No module named 'a_part_of_it'){INSTALL}",
        ),
        ("flash", CPU, "", HALF, WIDE, f" {NO_GPU}"),
        ("torch_varlen", CPU, None, FULL, WIDE, f" {NO_GPU}"),
        ("flash", CUDA, "", FULL, WIDE, f" {IN_FULL}"),
        ("torch_varlen", CUDA, None, FULL, WIDE, f" {IN_FULL}"),
        ("torch_varlen", CUDA, None, HALF, 320, f" {TOO_WIDE}"),
    ],
)
def test_backend_refused_in_one_sentence(
    name, device, wheel, dtype, width, said, flash_wheel: Callable[[str | None], None]
) -> None:
    flash_wheel(wheel)
    with pytest.raises(UserError) as refused:
        choose_backend(name, device, dtype, width)
    assert str(refused.value) == f"--attention {name}{said}"


def meta(tokens: int, heads: int, width: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(tokens, heads, width, dtype=dtype, device="meta", requires_grad=True)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("q_heads", "kv_heads", "width"), [(28, 4, 128), (4, 4, 8), (6, 1, 256)])
def test_torchs_kernel_has_the_right_shapes_and_a_backward(name: str, q_heads: int, kv_heads: int, width: int) -> None:
    # On the meta device: no GPU is needed, and no number is computed.
    queries, keys = (list(column) for column in zip(*LENGTHS[name], strict=True))
    q, k, v = meta(sum(queries), q_heads, width), meta(sum(keys), kv_heads, width), meta(sum(keys), kv_heads, width)
    ends = Ends(cumulative(queries).to("meta"), cumulative(keys).to("meta"), max(queries), max(keys))
    out = varlen_attention(q, k, v, ends, "torch_varlen")
    assert (out.shape, out.dtype) == (q.shape, HALF)
    for gradient, one in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (one.shape, HALF)


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_kernel_is_told_what_it_takes(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the operator calls its arguments, from its own schema: the same in every release that is tested.
    operator = torch.ops.aten._flash_attention_forward
    names = [argument.name for argument in operator.default._schema.arguments]
    given: dict[str, Any] = {}

    def note(*args: Any, **named: Any) -> tuple[torch.Tensor]:
        given.update(dict(zip(names, args, strict=False)) | named)
        return (args[0],)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", note)
    none = torch.zeros(2, dtype=torch.int32)
    BACKENDS["torch_varlen"](*(torch.zeros(1, 1, 8) for _ in range(3)), Ends(none, none, 3, 5, causal), 0.25)
    assert {name: one for name, one in given.items() if not isinstance(one, torch.Tensor)} == {
        "max_q": 3, "max_k": 5, "dropout_p": 0.0, "is_causal": causal, "return_debug_mask": False,
        "scale": 0.25, "window_size_left": -1, "window_size_right": 0 if causal else -1,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["flash", "torch_varlen"])
@pytest.mark.parametrize(("dtype", "width"), [(FULL, D), (HALF, 20)])
def test_a_kernel_never_gets_what_it_cannot_take(
    backend: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a run under torch_autocast decodes when it evaluates.
    monkeypatch.setitem(BACKENDS, backend, lambda *_: pytest.fail("the kernel was called"))
    q, k = torch.randn(4, 4, width, dtype=dtype), torch.randn(4, 2, width, dtype=dtype)
    ends = ends_of([1, 3], [1, 3])
    assert varlen_attention(q, k, k, ends, backend).equal(varlen_attention(q, k, k, ends, "sdpa"))


def test_queries_and_keys_take_the_dtype_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    # As under torch_autocast: rotary positions make float32 of q and k.
    lengths = LENGTHS["mixed"]
    ends = ends_of(*([pair[side] for pair in lengths] for side in (0, 1)))
    q = torch.randn(int(ends.cu_q[-1]), 4, D, generator=torch.Generator().manual_seed(1))
    k, v = torch.randn(2, int(ends.cu_k[-1]), 2, D, generator=torch.Generator().manual_seed(2))
    seen = []
    real = BACKENDS["sdpa"]
    monkeypatch.setitem(BACKENDS, "sdpa", lambda *args: seen.append([x.dtype for x in args[:3]]) or real(*args))
    made = varlen_attention(q, k, v.bfloat16(), ends)
    assert seen == [[torch.bfloat16] * 3]
    assert made.dtype == torch.bfloat16
    assert made.equal(varlen_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), ends))
