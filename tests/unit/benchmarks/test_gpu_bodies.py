"""The bodies of tests/gpu on the CPU: that they hold for what is right here, and that they can fail.

T tokens of the packed batch, Tq query tokens, Tk key tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.attention import HEADS, SHORT, worst
from gpu.engine import alone, planned_states
from gpu.launches import LAYER, PASS, most_launches, of_one_pass, one_call, operators
from gpu.memory import LEAST, MOST, planned
from gpu.packed import CPU, STAGES, Ready, Rows, drift, outcome, ready
from gpu.watch import HostRead, launched, launches, no_host_reads
from test_plan_activations import Live
from torch.nn import functional

from mirage_ds.data.batch import to_device
from mirage_ds.engine import ds_config as ds
from mirage_ds.model.attention import BACKENDS
from mirage_ds.model.layers import DecoderLayers

META = torch.device("meta")
# With an image and a latent run, without an image, with neither.
FEW = (0, 1, 3)
# float32 sums in another order, through 4 layers and 5 passes.
FP32 = 1e-5
TIMES = 3


def dense(q, k, v, ends, scale, aligned_right: bool = True):
    """Like flash-attn's, a back end that reads no length on the host: one mask (Tq, Tk) made from cu_seqlens."""
    cu_q, cu_k = ends.cu_q, ends.cu_k
    at_q, at_k = (torch.arange(x.shape[0], device=q.device) for x in (q, k))
    of_q, of_k = (torch.searchsorted(cu, at, right=True) for cu, at in ((cu_q, at_q.int()), (cu_k, at_k.int())))
    shift = 0 if aligned_right else 1
    from_q, from_k = (cu.index_select(0, of - shift) - at for cu, of, at in ((cu_q, of_q, at_q), (cu_k, of_k, at_k)))
    mask = (of_q[:, None] == of_k) & (from_k >= from_q[:, None])
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def top_left(*args: Any) -> torch.Tensor:
    return dense(*args, aligned_right=False)


def two_percent_off(*args: Any) -> torch.Tensor:
    return BACKENDS["sdpa"](*args[:-1], 1.02 * args[-1])


def a_digit_less(*args: Any) -> torch.Tensor:
    """Three bits fewer than bf16 in the output."""
    out = BACKENDS["sdpa"](*args)
    return (out.float() + out.float().detach() * 2.0**-5 * torch.sign(torch.sin(1e3 * out.float().detach()))).bfloat16()


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (dense, top_left, two_percent_off, a_digit_less, one_call):
        monkeypatch.setitem(BACKENDS, one.__name__, one)


Make = Callable[..., Ready]


@pytest.fixture(scope="module")
def make(nano: Path, mixed: Path) -> Make:
    """A model over few rows of nano, made once."""

    @lru_cache
    def loaded(stage: str, dtype: torch.dtype, chosen: tuple[int, ...]) -> Ready:
        return ready(Rows(nano, mixed, stage, 2, chosen), CPU, dtype, "sdpa")

    def made(stage: str, dtype: torch.dtype, backend: str, chosen: tuple[int, ...] = FEW) -> Ready:
        found = loaded(stage, dtype, chosen)
        found.model.how.attention = backend
        return found

    return made


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", SHORT)
def test_sdpa_errs_no_more_than_bf16_rounds(lengths: str, heads: tuple[int, int, int]) -> None:
    found = worst(CPU, "sdpa", SHORT[lengths], heads)
    assert 0.01 < max(found.values()) <= 1, found


@pytest.mark.parametrize("wrong", ["two_percent_off", "top_left", "a_digit_less"])
def test_a_wrong_back_end_errs_more(wrong: str) -> None:
    assert worst(CPU, wrong, SHORT["last pass"], HEADS[0])["out"] > 2


# ------------------------------------------------------------------------------------------------------------ forward


def test_float32_is_the_same_through_another_back_end(make: Make) -> None:
    wanted = outcome(make("stage2", torch.float32, "sdpa"))
    got = outcome(make("stage2", torch.float32, "dense"))
    assert abs(got.loss - wanted.loss) <= FP32 * wanted.loss
    assert max(drift(got, wanted)) <= FP32
    assert max(drift(outcome(make("stage2", torch.float32, "top_left")), wanted)) > 100 * FP32


def test_bf16_drifts_alike_and_a_wrong_mask_further(make: Make) -> None:
    exact = outcome(make("stage2", torch.float32, "sdpa", (0,)))
    usual, alike, wrong = (
        drift(outcome(make("stage2", torch.bfloat16, name, (0,))), exact) for name in ("sdpa", "dense", "top_left")
    )
    assert all(0 < found <= TIMES * most for found, most in zip(alike, usual, strict=True))
    assert all(found > TIMES * most for found, most in zip(wrong, usual, strict=True))


# ------------------------------------------------------------------------------------------------- the host never waits


@pytest.mark.parametrize("stage", STAGES)
def test_forward_and_backward_wait_for_no_value(stage: str, make: Make) -> None:
    made = make(stage, torch.float32, "dense")
    with no_host_reads(CPU):
        made.step()
    # There are no values on the meta device, and what goes there or comes from there is a copy that is seen.
    model = copy.deepcopy(made.model).to(META)
    model.layers = DecoderLayers(model.language_model.layers)
    meta = Ready(model, to_device(made.batch, META), made.counts)
    with no_host_reads(META):
        assert meta.step().device == META
    meta.model.how.attention = "sdpa"
    with pytest.raises(HostRead, match="between cpu and meta"), no_host_reads(META):
        meta.step()


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "float": lambda x: float(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "where of one": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.clone().index_put((x > 0,), torch.zeros(1)),
    "unique": torch.unique,
    "unique_consecutive": torch.unique_consecutive,
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: torch.bincount(x.long()),
    "a new tensor": lambda x: torch.tensor([1.0], device=x.device),
    "a copy": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("name", READS)
def test_each_way_to_wait_is_seen(name: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(HostRead), no_host_reads(CPU):
        READS[name](x)


def test_what_does_not_wait_passes() -> None:
    x, places = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2])
    with no_host_reads(CPU):
        x[places] + x.masked_fill(x > 1, 0.0)[:2].clamp(min=1)
        x.index_put((places,), x.new_zeros(1)).to(torch.bfloat16)
        x.repeat_interleave(x.long(), output_size=6)


# ----------------------------------------------------------------------------------------------------------- launches


def test_a_one_token_pass_has_the_operators_that_were_counted(nano: Path, mixed: Path) -> None:
    layers = json.loads((nano / "config.json").read_text())["text_config"]["num_hidden_layers"]
    assert operators(layers) == layers * sum(LAYER.values()) + sum(PASS.values())
    assert of_one_pass(nano, mixed, CPU, "one_call", "loss", (1, 2)) == operators(layers)
    assert operators(layers) < most_launches(layers) < 2 * operators(layers)


def test_views_and_bare_allocations_are_no_launches() -> None:
    x = torch.ones(4, 6)
    counted = launches(CPU, lambda: (x.view(6, 4).t()[1:], torch.empty(3), x + 1, x.add_(1), x @ x.t()))
    assert counted == {"add": 1, "add_": 1, "mm": 1}


def test_launches_are_known_by_their_names() -> None:
    names = [
        "aten::mm",
        "cudaLaunchKernel",
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaMemsetAsync",
        "cudaStreamSync",
    ]
    names += [
        "cudaMemcpyAsync",
        "void at::native::vectorized_elementwise_kernel",
        "cudaDeviceSynchronize",
        "cudaMalloc",
    ]
    counted = {"cudaLaunchKernel": 2, "cuLaunchKernelEx": 1, "cudaMemsetAsync": 1, "cudaMemcpyAsync": 1}
    assert launched(names) == counted


# ------------------------------------------------------------------------------------------------- memory and the JSONs


@pytest.mark.parametrize("stage", STAGES)
def test_a_micro_step_takes_what_was_planned(stage: str, nano: Path, mixed: Path) -> None:
    rows, chunk_bytes = Rows(nano, mixed, stage, 2, FEW), 1 << 20
    made = ready(rows, CPU, torch.float32, "sdpa", loss_chunk_bytes=chunk_bytes)
    for parameter in made.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Live() as live:
        made.step()
    computed = planned(rows, made.batch, 4, "sdpa", chunk_bytes, "cpu").total
    assert LEAST * computed <= live.peak <= MOST * computed
    twice = planned(rows, made.batch, 8, "sdpa", chunk_bytes, "cpu").total
    assert not LEAST * twice <= live.peak <= MOST * twice


def test_one_gpu_runs_every_json_but_hpz(nano: Path) -> None:
    names = {path.stem for path in ds.recipes()}
    assert names - set(alone()) == {"zero3_hpz"}
    for name in names:
        obstacle = planned_states(nano, ds.shipped_folder() / f"{name}.json").obstacle
        assert (obstacle is None) == (name in alone()), obstacle
