"""What the precision of weights, states and gradient sums does to an optimizer step: ZeRO-3 on two ranks.

The reference is one process with torch alone: forward and backward of each rank's rows, the mean over ranks rounded as
the collective rounds it, a float64 sum over the micro-steps, torch.optim.AdamW on float32 copies of the weights. As in
the trainer the last pass has a backward of its own, whose gradients are rounded and reduced for themselves.

W ranks, G micro-steps of a step, w a weight. ulp(w): the distance of two neighbours of w's size.

How far latents that are fed back drift in bf16 stands in tests/unit/model/test_forward.py (test_bf16_drift_…).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.group import Group

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import collate
from mirage_ds.data.encode import IMAGE_PAD, LATENT_PAD
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.engine import ds_config as ds
from mirage_ds.model.load import load_model, public_name
from mirage_ds.model.loss import StepCounts, objective
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run

K, STEPS, WORLD = 2, 2, 2
# The public code's rate and the default. The warm-up would give the first step a rate of 0.
RATE, BETAS, EPS, DECAY, CLIP = 1e-5, (0.9, 0.95), 1e-8, 0.01, 1.0
# One row a micro-step: G = 3 on two ranks.
SETTINGS: dict[str, Any] = dict(
    stage="stage2", latent_size=K, global_batch_size=6, micro_batch_size=1, max_steps=STEPS, warmup_steps=0,
    lr_scheduler="constant", num_workers=0, report_to=["none"], gradient_checkpointing=False,
)  # fmt: skip
# Half an ulp is at most this part of the number: bf16 has 8 bits of mantissa, the hidden one included, fp32 24.
BF16, FP32 = 2.0**-8, 2.0**-24
# A quiet machine needs a fifth of it for the first run, which imports torch, transformers and DeepSpeed.
LIMIT_S = 120
Tensors = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------------ on the ranks


def _train(world: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Train through the trainer's own step; what the engine holds before and after each, put together whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    engine = learner.engine
    named = [(public_name(name), p) for name, p in engine.module.named_parameters()]

    def masters() -> Tensors:
        return {name: safe_get_full_fp32_param(p).clone() for name, p in named}

    found: dict[str, Any] = dict(bins=[], gradients=[], weights=[masters()], metrics=[])
    take = engine.step

    def step() -> None:
        # What the micro-steps have summed up, before it is clipped.
        found["gradients"].append({name: safe_get_full_grad(p).clone() for name, p in named})
        take()

    engine.step = step
    for plan, batches in data.loader.steps(0, STEPS):
        found["metrics"].append(steps.step(run, data, learner, plan, batches).metrics)
        found["bins"].append(plan.bins)
        found["weights"].append(masters())
    found["states"] = {v.dtype for state in engine.optimizer.state.values() for v in state.values() if v.numel() > 1}
    engine.destroy()
    return found


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def apart(one: Tensors, other: Tensors) -> float:
    return float((flat(one) - flat(other)).norm() / flat(other).norm())


def clipped(gradients: Tensors) -> Tensors:
    """The gradients as AdamW gets them."""
    factor = min(1.0, CLIP / float(flat(gradients).norm() + 1e-6))
    return {name: gradient.double() * factor for name, gradient in gradients.items()}


# ------------------------------------------------------------------------------------------------- the one process


def _mean_over_ranks(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """As the collective does: halved, which is exact, then one rounding to the dtype of both."""
    return one / WORLD + other / WORLD


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As DeepSpeed replaces torch's own under ZeRO-3: rows of (1, T, I) are rounded before the bias is added.

    Those of (T, I) are not, which the layers of passes but the last get.
    """
    if x.dim() == 2 and bias is not None:
        return torch.addmm(bias, x, weight.t())
    product = x.matmul(weight.t())
    return product if bias is None else product + bias


@mock.patch("torch.nn.functional.linear", _linear)
def _reference(folder: Path, data: Path, bins_of_steps: list, dtype: torch.dtype) -> dict[str, Any]:
    """Train in one process: gradients of each step as float64 sums over its micro-steps, weights as float32."""
    encoder = load_encoder([str(folder)], ImageFinder.beside(data, None), "stage2", K)
    samples = [encoder.encode(record, number) for number, record in enumerate(scan(data)[0])]
    loaded = load_model(
        folder, stage="stage2", dtype=dtype, device=torch.device("cpu"), attention="sdpa", checkpointing=False
    )
    model, tower = loaded.model, loaded.tower
    assert tower
    model.how.split = True
    named = [(public_name(name), p) for name, p in model.named_parameters()]
    masters = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in named}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters.values() if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=BETAS,
        eps=EPS,
    )
    read = torch.cat([samples[row].input_ids for micro in bins_of_steps[0] for rank in micro for row in rank]).unique()
    overwritten = [encoder.id_of(token) for token in (IMAGE_PAD, LATENT_PAD)]
    # Backwards of the first step: one for a micro-step of a single pass, else two.
    found: dict[str, Any] = dict(gradients=[], sizes=[], weights=[], losses=[], backwards=0)
    found["occurring"] = read[~torch.isin(read, torch.tensor(overwritten))]
    for bins in bins_of_steps:
        rows = [row for micro in bins for rank in micro for row in rank]
        counts = StepCounts(
            rows=len(rows),
            labels=sum(int((samples[row].labels >= 0).sum()) for row in rows),
            latents=sum(K * len(samples[row].runs) for row in rows),
        )
        sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named}
        sizes = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named}
        losses = []
        for number, micro in enumerate(bins):
            ranks = []
            runs = max(len(samples[row].runs) for rank in micro for row in rank)
            for rank in micro:
                batch = tower.attach(collate([samples[row] for row in rank], runs * K + 1, encoder.dummy(runs)))
                model_sums = model(batch)
                loss, _, _ = objective(model_sums, counts, 1.0, "sample")
                losses.append(float(loss.detach()))
                parts = []
                # A single pass has one backward.
                for root in (loss * WORLD, model_sums.earlier)[: 1 + bool(runs)]:
                    model.zero_grad()
                    root.backward()
                    parts.append({name: p.grad.clone() for name, p in named if p.grad is not None})
                ranks.append(parts)
            found["backwards"] += 0 if found["losses"] else len(ranks[0])
            for part, (one, other) in enumerate(zip(*ranks, strict=True)):
                assert one.keys() == other.keys() == sums.keys()
                for name, size in sizes.items():
                    mean = _mean_over_ranks(one[name], other[name])
                    assert mean.dtype == dtype
                    sums[name].add_(mean.double())
                    # The first is copied, not added.
                    size.add_(sums[name].abs() if number or part else 0)
        for name, gradient in clipped(sums).items():
            masters[name].grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            for name, p in named:
                p.copy_(masters[name])
        found["gradients"].append(sums)
        found["sizes"].append(sizes)
        found["weights"].append({name: p.detach().clone() for name, p in masters.items()})
        found["losses"].append(sum(losses))
    return found


# -------------------------------------------------------------------------------------------------------- the runs


def _shipped(**changes: Any) -> dict[str, Any]:
    """The JSON that ships for stage2 on GPUs, with everything sharded and without what a CPU cannot do."""
    values = ds.read_json(ds.default_path("stage2"))
    values["zero_optimization"] |= dict(stage3_param_persistence_threshold=0, overlap_comm=False)
    return {key: value for key, value in (values | changes).items() if value is not None}


MASTER, STATES = "bf16_master_weights_and_grads", "bf16_optimizer_states"
JSONS = {
    "default": _shipped(),
    "sums in bf16": _shipped(data_types=None),
    "states in bf16": _shipped(bf16={"enabled": True, MASTER: True, STATES: True}, data_types=None),
    "autocast": _shipped(bf16=None, torch_autocast={"enabled": True, "dtype": "bfloat16"}),
}


class Runs:
    """Runs each JSON once, from the same weights over the same rows."""

    def __init__(self, folder: Path, data: Path, scratch: Path):
        self.folder, self.data, self.scratch = folder, data, scratch
        self.group, self.cast = Group(), False
        self.made: dict[str, list[dict[str, Any]]] = {}
        self.references: dict[torch.dtype, dict[str, Any]] = {}

    def ranks(self, name: str, **settings: Any) -> list[dict[str, Any]]:
        key = f"{name} {settings}"
        if key not in self.made:
            path = self.scratch / f"run{len(self.made)}.json"
            path.write_text(json.dumps(JSONS[name]))
            said = SETTINGS | dict(
                model=str(self.folder), data_path=self.data, deepspeed=path, learning_rate=RATE,
                save_model_path=self.scratch / path.stem, cache_dir=self.scratch / "cache",
            )  # fmt: skip
            # Once torch_autocast has been on, DeepSpeed keeps it on for the rest of a process.
            if self.cast and name != "autocast":
                self.group.stop()
            self.cast = name == "autocast"
            self.made[key] = self.group.run(_train, said | settings, timeout_s=LIMIT_S)
        return self.made[key]

    def run(self, name: str, **settings: Any) -> dict[str, Any]:
        return self.ranks(name, **settings)[0]

    def reference(self, dtype: torch.dtype) -> dict[str, Any]:
        if dtype not in self.references:
            self.references[dtype] = _reference(self.folder, self.data, self.run("default")["bins"], dtype)
        return self.references[dtype]

    def stop(self) -> None:
        self.group.stop()


@pytest.fixture(scope="module")
def runs(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(nano, mixed, tmp_path_factory.mktemp("runs"))
    yield made
    made.stop()


def ulp(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Distance of float32 neighbours at the larger of two weights, as float64."""
    larger = torch.maximum(one.abs(), other.abs())
    return (torch.nextafter(larger, torch.tensor(torch.inf)) - larger).double()


# -------------------------------------------------------------------------------------------------------- the tests


def test_at_the_default_rate_every_tensor_moves_by_about_the_rate(runs: Runs) -> None:
    found, occurring = runs.run("default"), runs.reference(torch.bfloat16)["occurring"]
    assert len(occurring) > 20
    assert found["states"] == {torch.float32}
    before, after = found["weights"][:2]
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    # Norms, biases and matrices of every layer, the embedding and the last norm.
    assert {weight.ndim for weight in after.values()} == {1, 2}
    for name, gradient in clipped(found["gradients"][0]).items():
        # AdamW's first way is rate · g / (|g| + ε), 10/11 of the rate at least; a matrix decays by rate · 0.01 · |w|.
        live = gradient.abs() >= 10 * EPS
        way = (after[name].double() - before[name].double()).abs()[live]
        size = before[name].double().abs()[live]
        # Rounded: 1 − rate · 0.01, the decayed weight, the moved one.
        room = 1.5 * ulp(before[name], after[name])[live] + RATE * DECAY * size
        # Of a token that does not occur, the embedding gets what its vanishing probability is worth. In a bias, a
        # sum over tokens in bf16 may cancel; where it does differs among processors.
        shown = live[occurring if "embed" in name else ...].double()
        assert shown.mean() > (0.9 if name.endswith("bias") else 0.99), name
        assert bool((way > 0).all()), name
        assert bool((way >= 10 / 11 * RATE - room).all()), name
        assert bool((way <= RATE + room).all()), name
    # The forward's own weights have not all followed: half an ulp of bf16 is more than the rate from 2⁻⁸ on.
    seen = torch.cat([(after[name].bfloat16() != before[name].bfloat16()).flatten() for name in after])
    assert seen.double().mean() < 0.05


def test_gradients_and_weights_are_those_of_one_process_with_plain_adamw(runs: Runs) -> None:
    wanted = runs.reference(torch.bfloat16)
    # Moments, root and quotient of an AdamW step: eight roundings of what is at most about the rate.
    step_room = 8 * FP32 * RATE
    for found in runs.ranks("default"):
        assert [len(bins) for bins in found["bins"]] == [3] * STEPS
        for step in range(STEPS):
            assert found["metrics"][step]["loss"] == pytest.approx(wanted["losses"][step], rel=1e-6)
            before, after = found["weights"][step : step + 2]
            assert after.keys() == wanted["weights"][step].keys()
            for name, weight in wanted["weights"][step].items():
                error = (found["gradients"][step][name].double() - wanted["gradients"][step][name]).abs()
                assert bool((error <= FP32 * wanted["sizes"][step][name]).all()), name
                error = (after[name].double() - weight.double()).abs()
                assert bool((error <= (step + 1) * (ulp(before[name], after[name]) + step_room)).all()), name


def test_sums_over_micro_steps_lose_a_bf16_digit_where_they_are_kept_in_bf16(runs: Runs) -> None:
    """Both sums are of the same numbers: each micro-step's gradient comes in bf16 from backward and collective."""
    wanted = runs.reference(torch.bfloat16)
    exact, sizes = wanted["gradients"][0], wanted["sizes"][0]
    found = {name: runs.run(name)["gradients"][0] for name in ("default", "sums in bf16")}
    added = wanted["backwards"]
    for name, gradient in exact.items():
        error = (found["sums in bf16"][name].double() - gradient).abs()
        assert bool((error <= BF16 * (1 + BF16) ** added * sizes[name]).all()), name
    # No bf16 number is nearer than the nearest.
    least = apart({name: gradient.bfloat16() for name, gradient in exact.items()}, exact)
    assert apart(found["sums in bf16"], exact) >= least > 1e-3
    assert apart(found["default"], exact) <= FP32 * added


def test_bf16_master_weights_stay_where_half_an_ulp_is_above_the_rate(runs: Runs) -> None:
    found = runs.run("states in bf16")
    assert found["states"] == {torch.bfloat16}
    assert {weight.dtype for weights in found["weights"] for weight in weights.values()} == {torch.bfloat16}
    # A weight of 2ᵉ ≤ |w| < 2ᵉ⁺¹ has neighbours 2ᵉ⁻⁷ away and comes to one by half of that or more. The rate 1e-5 lies
    # between 2⁻¹⁷ and 2⁻¹⁶, with 30 % to spare on both sides for the rounding of the moments: e is −9 at most.
    limit = 2.0**-8
    assert 1.25 * 2.0**-17 < RATE < 2.0**-16 / 1.25
    first, second, last = found["weights"]
    live = {name: gradient.abs() >= 100 * EPS for name, gradient in clipped(found["gradients"][0]).items()}
    small = {name: weight.abs() < limit for name, weight in first.items()}
    for name, weight in first.items():
        # 2⁻⁸ itself has a nearer neighbour below.
        assert not bool(((last[name] != weight) & (weight.abs() > limit)).any()), name
        moved = second[name] != weight
        assert bool(moved[small[name] & live[name]].all()), name
        share = float(moved.double().mean())
        if name.endswith("norm.weight"):
            assert share == 0, name
        elif name.endswith("bias"):
            # They start at 0, whose neighbours are as near as can be: whatever has a gradient moves.
            assert torch.equal(moved, found["gradients"][0][name] != 0), name
            assert moved.any(), name
        else:
            # Weights start as N(0, 0.08²): P(|w| < 2⁻⁸) = 3.9 %.
            assert share <= float((weight.abs() <= limit).double().mean()) < 0.05, name
    with_masters = runs.run("default")["weights"]
    assert float((flat(with_masters[2]) != flat(with_masters[0])).double().mean()) > 0.99
    assert float((flat(last) != flat(first)).double().mean()) < 0.05


def test_torch_autocast_is_as_near_to_fp32_as_bf16_weights_are(runs: Runs) -> None:
    """Products of the layers in bf16; weights, the sum over layers, the frozen tower and the loss head in fp32."""
    weights, cast, exact = runs.run("default"), runs.run("autocast"), runs.reference(torch.float32)
    assert cast["bins"] == weights["bins"]
    assert cast["states"] == {torch.float32}
    far, near = (apart(one["gradients"][0], exact["gradients"][0]) for one in (weights, cast))
    # Not fp32 under another name, and no coarser than bf16 weights.
    assert 1e-3 < near <= far < 0.05
    loss = exact["losses"][0]
    assert 0 < abs(cast["metrics"][0]["loss"] - loss) <= BF16 / 4 * loss
    # The fp32 weights move as in fp32.
    assert float((flat(cast["weights"][1]) != flat(cast["weights"][0])).double().mean()) > 0.99


@pytest.mark.slow
def test_recomputing_under_torch_autocast_changes_nothing(runs: Runs) -> None:
    """Backward runs outside of autocast; a layer recomputed there must do its products in bf16 again."""
    kept, recomputed = runs.run("autocast"), runs.run("autocast", gradient_checkpointing=True)
    for one, other in zip(kept["gradients"], recomputed["gradients"], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [step["loss"] for step in kept["metrics"]] == [step["loss"] for step in recomputed["metrics"]]
