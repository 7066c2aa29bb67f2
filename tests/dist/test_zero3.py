"""ZeRO-3 on two ranks, with the shipped JSONs, against one plain process that takes the whole step's rows at once.

The reference knows no DeepSpeed, no planner and no accumulation: rows of the step → summed losses → backward → clip →
torch.optim.AdamW with the schedule written out. That its forward is right stands in tests/unit/model/test_forward.py.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from support.group import Group, GroupFailure

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.checkpoint import CheckpointWriter
from mirage_ds.engine.versions import gather_safely
from mirage_ds.model.load import load_model, public_name
from mirage_ds.model.loss import StepCounts, objective
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run

GATHERS_VIEWS = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"),
    reason="gloo of torch 2.8 cannot gather into the views that ZeRO-1 and 2 hand it",
)
STAGES = ("sft", "stage1", "stage2")
K = 2
# ε this large makes AdamW's step a smooth function of the gradient: |∂step/∂g| ≤ lr / ε = 3. With the usual 1e-8 an
# entry whose gradient is rounding noise moves by ± lr, and no tolerance would mean anything.
BASE: dict[str, Any] = dict(
    latent_size=K, global_batch_size=8, micro_batch_size=4, max_steps=2, warmup_steps=1, learning_rate=3e-3,
    adam_eps=1e-3, num_workers=0, report_to=["none"], max_grad_norm=1.0,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ on the ranks


def _gather(parameters: list) -> dict[str, np.ndarray]:
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for _, p in parameters if hasattr(p, "ds_id")]):
        return {public_name(name): p.detach().numpy().copy() for name, p in parameters}


def _run(world: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Train through train.py's own functions; what happened, seen from this rank."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    engine = learner.engine
    parameters = list(engine.module.named_parameters())
    found: dict[str, Any] = dict(steps=[], bins=[], gradients=[], local=[], gathered=0)
    take = steps.apply_gradients

    def apply(*given: Any) -> tuple[bool, float]:
        # What backward left, before it is clipped.
        found["gradients"].append({public_name(n): safe_get_full_grad(p).numpy().copy() for n, p in parameters})
        if engine.zero_optimization_partition_weights():
            found["local"].append({public_name(n): float(safe_get_local_grad(p).norm()) for n, p in parameters})
        return take(*given)

    def count(*_: Any) -> None:
        whole = [p.ds_numel for _, p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE]
        found["gathered"] = max(found["gathered"], sum(whole))

    engine.module.language_model.norm.register_forward_hook(count)
    with mock.patch.object(steps, "apply_gradients", apply):
        for plan, batches in data.loader.steps(0, data.steps):
            found["steps"].append(steps.step(run, data, learner, plan, batches).metrics)
            found["bins"].append(plan.bins)
    found["weights"] = _gather(parameters)
    found["names"] = [public_name(name) for name, _ in parameters]
    engine.destroy()
    return found


def _load(world: Any, folder: Path, train_vision: bool) -> dict[str, Any]:
    path = ds.default_path("stage2")
    config = RunConfig(model=str(folder), stage="stage2", data_path=folder, save_model_path=folder)
    values = ds.resolve(ds.read_json(path, "cpu"), path, config, world.size)
    gather_safely(values, "cpu")
    loaded = load_model(
        folder, stage="stage2", dtype=torch.float32, device=world.device, train_vision=train_vision, ds_config=values
    )
    parameters = list(loaded.model.named_parameters())
    return dict(
        own=sum(p.ds_tensor.numel() for _, p in parameters),
        whole=sum(p.ds_numel for _, p in parameters),
        tower=sum(p.numel() for p in loaded.tower.tower.parameters()) if loaded.tower else 0,
        weights=_gather(parameters),
    )


def _save(world: Any, settings: dict[str, Any], checkpoints: Path) -> dict[str, Any]:
    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    engine = learner.engine
    for plan, batches in data.loader.steps(0, 1):
        steps.step(run, data, learner, plan, batches)
    CheckpointWriter(engine, checkpoints, {"step": 1, "world_size": world.size}, world).finish(2)
    latest = [(checkpoints / "latest").read_text()]
    learner.save(world, config.save_model_path, data.steps, {})
    return dict(latest=latest, weights=_gather(list(engine.module.named_parameters())))


def _nothing(world: Any) -> None: ...


def _hang(world: Any) -> None:
    if world.rank == 1:
        time.sleep(30)


# ------------------------------------------------------------------------------------------------- the one process


@lru_cache
def _samples(folder: Path, data: Path, stage: str) -> tuple[list, Any]:
    encoder = load_encoder([str(folder)], ImageFinder.beside(data, None), stage, K)
    return [encoder.encode(record, i) for i, record in enumerate(scan(data)[0])], encoder


@lru_cache
def _reference(
    folder: Path, data: Path, stage: str, reduction: str, train_vision: bool, clip: float, rows_of_steps: tuple
) -> dict[str, Any]:
    """The same rows in one process without DeepSpeed."""
    samples, encoder = _samples(folder, data, stage)
    loaded = load_model(
        folder, stage=stage, dtype=torch.float32, device=torch.device("cpu"), reduction=reduction,
        train_vision=train_vision, checkpointing=False,
    )  # fmt: skip
    model = loaded.model
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=BASE["adam_eps"])
    found: dict[str, Any] = dict(steps=[], gradients=[])
    found["before"] = {public_name(name): p.detach().numpy().copy() for name, p in named}
    passes = K + 1 if stage == "stage2" else 1
    for number, rows in enumerate(rows_of_steps):
        chosen = [samples[row] for row in rows]
        batch = collate(chosen, passes, encoder.dummy((passes - 1) // K))
        if loaded.tower:
            batch = loaded.tower.attach(batch)
        counts = StepCounts(
            rows=len(rows),
            labels=sum(int((one.labels >= 0).sum()) for one in chosen),
            latents=sum(K * len(one.runs) for one in chosen),
        )
        loss, _, _ = objective(model(batch), counts, 0.1 if stage == "stage1" else 1.0, reduction)
        optimizer.zero_grad()
        loss.backward()
        found["gradients"].append({public_name(name): p.grad.numpy().copy() for name, p in named})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        warmup, last = BASE["warmup_steps"], len(rows_of_steps)
        turn = math.pi * (number - warmup) / (last - warmup)
        rate = BASE["learning_rate"] * (number / warmup if number < warmup else (1 + math.cos(turn)) / 2)
        for one in optimizer.param_groups:
            one["lr"] = rate
        found["steps"].append(dict(loss=float(loss.detach()), grad_norm=float(norm), lr=rate))
        optimizer.step()
    found["weights"] = {public_name(name): p.detach().numpy().copy() for name, p in named}
    return found


def apart(one: np.ndarray, other: np.ndarray) -> float:
    if not one.any() and not other.any():
        return 0.0
    return float(np.linalg.norm(one.astype(np.float64) - other) / np.linalg.norm(other.astype(np.float64)))


class Runs:
    """Runs settings on the group and on one process, each once."""

    def __init__(self, group: Group, scratch: Path, data: dict[str, Path], folder: Path):
        self.group, self.scratch, self.data, self.folder = group, scratch, data, folder
        self.number = itertools.count()
        self.made: dict[str, list[dict[str, Any]]] = {}

    def run(self, stage: str, folder: Path | None = None, **settings: Any) -> list[dict[str, Any]]:
        key = json.dumps([stage, str(folder), settings], default=str)
        if key not in self.made:
            said = BASE | dict(
                model=str(folder or self.folder), stage=stage, data_path=self.data[stage],
                save_model_path=self.scratch / f"run{next(self.number)}", cache_dir=self.scratch / "cache",
            )  # fmt: skip
            self.made[key] = self.group.run(_run, said | settings)
        return self.made[key]

    def json(self, **zero: Any) -> Path:
        """Write a DeepSpeed JSON like the shipped ones but for `zero`."""
        if zero["stage"] == 3:
            zero |= dict(stage3_param_persistence_threshold=0, overlap_comm=False)
        path = self.scratch / f"zero{'_'.join(str(value) for value in zero.values())}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        return path

    def check(self, stage: str, folder: Path | None = None, **settings: Any) -> list[dict[str, Any]]:
        """Every step's loss, gradient norm and learning rate, gradients and weights, against the one process."""
        ranks = self.run(stage, folder, **settings)
        steps = tuple(tuple(row for micro in bins for one in micro for row in one) for bins in ranks[0]["bins"])
        rows_per_step = settings.get("global_batch_size", BASE["global_batch_size"])
        assert all(len(rows) == rows_per_step for rows in steps)
        wanted = _reference(
            folder or self.folder, self.data[stage], stage, settings.get("reduction", "sample"),
            settings.get("train_vision", False), settings.get("max_grad_norm", BASE["max_grad_norm"]), steps,
        )  # fmt: skip
        for found in ranks:
            assert len(found["steps"]) == len(steps)
            for got, one in zip(found["steps"], wanted["steps"], strict=True):
                assert abs(got["loss"] - one["loss"]) <= 1e-5
                assert got["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
                assert got["lr"] == pytest.approx(one["lr"], rel=1e-6)
            far = worst_gradient(found["gradients"][0], wanted["gradients"][0])
            moved = worst_weight(found["weights"], wanted)
            assert far[0] <= 1e-5, far
            # A gradient 1e-5 off moves its weight by up to (√v + ε) / ε times as much. Measured: 6e-5 at most.
            assert moved[0] <= 1e-4, moved
        return ranks


def worst_gradient(got: dict, wanted: dict) -> tuple[float, str]:
    assert got.keys() == wanted.keys()
    return max((apart(got[name], wanted[name]), name) for name in wanted)


def worst_weight(got: dict, wanted: dict) -> tuple[float, str]:
    """The error of each weight's way, relative to the way."""
    assert got.keys() == wanted["weights"].keys()
    before = wanted["before"]
    return max((apart(got[name] - before[name], wanted["weights"][name] - before[name]), name) for name in got)


@pytest.fixture(scope="module")
def runs(group: Group, nano: Path, mixed: Path, helped: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    data = dict(sft=mixed, stage1=helped, stage2=mixed)
    return Runs(group, tmp_path_factory.mktemp("runs"), data, nano)


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train_vision", [False, True])
def test_each_rank_loads_half_and_together_the_whole(runs: Runs, untied: Path, tied: bool, train_vision: bool) -> None:
    folder = runs.folder if tied else untied
    stored = load_file(folder / "model.safetensors")
    for found in runs.group.run(_load, folder, train_vision):
        wanted = {name for name in stored if train_vision or not name.startswith("visual.")}
        assert found["weights"].keys() == wanted
        assert all(np.array_equal(found["weights"][name], stored[name].numpy()) for name in wanted)
        # An odd number of elements is padded to an even one.
        assert found["whole"] == sum(stored[name].numel() for name in wanted)
        assert found["whole"] / 2 <= found["own"] <= found["whole"] / 2 + len(wanted)
        assert found["tower"] == (0 if train_vision else sum(stored[n].numel() for n in stored if n not in wanted))


@pytest.mark.parametrize("stage", STAGES)
def test_four_micro_steps_equal_one_process(runs: Runs, stage: str) -> None:
    for found in runs.check(stage, micro_batch_size=1, max_steps=3):
        assert {len(bins) for bins in found["bins"]} == {4}
        assert max(step["grad_norm"] for step in found["steps"]) > BASE["max_grad_norm"]


@pytest.mark.parametrize("stage", STAGES)
def test_one_micro_step_equals_four(runs: Runs, stage: str) -> None:
    single, packed = runs.run(stage, micro_batch_size=1, max_steps=3), runs.check(stage)
    assert {len(bins) for bins in packed[0]["bins"]} == {1}
    assert abs(single[0]["steps"][0]["loss"] - packed[0]["steps"][0]["loss"]) <= 1e-5
    assert worst_gradient(single[0]["gradients"][0], packed[0]["gradients"][0])[0] <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_token_reduction_equals_one_process(runs: Runs, stage: str) -> None:
    assert {len(bins) for bins in runs.check(stage, reduction="token", micro_batch_size=2)[0]["bins"]} == {2}


# All four in the stage of several passes; in the others each value meets each.
@pytest.mark.parametrize(
    ("stage", "released", "checkpointing"),
    [
        *(("stage2", released, checkpointing) for released in (False, True) for checkpointing in (False, True)),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (("sft", False, True), ("sft", True, False), ("stage1", False, False), ("stage1", True, True))
        ),
    ],
)
def test_checkpointing_and_release_change_nothing(runs: Runs, stage: str, released: bool, checkpointing: bool) -> None:
    settings: dict[str, Any] = {} if checkpointing else dict(gradient_checkpointing=False)
    shipped = runs.run(stage)[0]
    limit = 0 if released else 10**12
    settings["deepspeed"] = runs.json(stage=3, stage3_max_live_parameters=limit, stage3_max_reuse_distance=limit)
    found = runs.check(stage, **settings)[0]
    for got, one in zip(found["steps"], shipped["steps"], strict=True):
        assert abs(got["loss"] - one["loss"]) <= 1e-5
    assert worst_gradient(found["gradients"][0], shipped["gradients"][0])[0] <= 1e-5
    # The release is real: what is gathered at once is far from the whole model.
    whole = sum(weight.size for weight in found["weights"].values())
    assert found["gathered"] < whole / 2 if released else found["gathered"] > 0.9 * whole


def kinds(ranks: list, data: Path, what: str) -> set[tuple[bool, ...]]:
    """Over all micro-steps: which ranks hold a row that has `what`."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    return {tuple(any(what in rows[i] for i in one) for one in micro) for bins in ranks[0]["bins"] for micro in bins}


# Three rows a step on two ranks, one row a micro-batch: a rank has none in every other micro-step. With these seeds
# each rank meets rows without image and without helper while the other has them.
UNEVEN = {
    stage: dict(global_batch_size=3, micro_batch_size=1, max_steps=4, seed=0 if stage == "stage1" else 2)
    for stage in STAGES
}


@pytest.mark.parametrize(
    ("stage", "train_vision"), [("sft", True), ("stage1", True), ("stage2", False), ("stage2", True)]
)
def test_ranks_without_image_helper_latents_or_rows(runs: Runs, stage: str, train_vision: bool) -> None:
    ranks, data = runs.check(stage, train_vision=train_vision, **UNEVEN[stage]), runs.data[stage]
    assert {(True, False), (False, True)} <= kinds(ranks, data, "image_input")
    assert {(True, True), (True, False)} <= kinds(ranks, data, "text_input")
    assert {(True, True), (True, False)} <= kinds(ranks, data, "image_output")
    assert stage == "stage1" or (False, True) in kinds(ranks, data, "image_output")


@pytest.mark.parametrize(("stage", "train_vision"), [("stage1", True), ("stage2", False)])
def test_idle_rank_runs_along(runs: Runs, stage: str, train_vision: bool) -> None:
    idle = dict(global_batch_size=1, allow_idle_ranks=True, max_steps=3)
    ranks = runs.check(stage, train_vision=train_vision, **idle)
    assert all(not micro[1] for bins in ranks[0]["bins"] for micro in bins)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_has_a_gradient_on_both_ranks(runs: Runs, untied: Path, stage: str, tied: bool) -> None:
    # Each rank's own half of the gradient, in the steps of the test above (some of them have no image).
    settings = UNEVEN[stage] if tied else {}
    for found in runs.check(stage, None if tied else untied, train_vision=True, **settings):
        assert ("lm_head.weight" in found["names"]) != tied
        assert any(name.startswith("visual.blocks") for name in found["names"])
        for name in found["names"]:
            assert max(step[name] for step in found["local"]) > 0, name


@pytest.mark.parametrize("zero_stage", [0, *(pytest.param(number, marks=GATHERS_VIEWS) for number in (1, 2))])
def test_other_zero_stages_equal_one_process(runs: Runs, zero_stage: int) -> None:
    runs.check("stage2", deepspeed=runs.json(stage=zero_stage), micro_batch_size=2)


def test_unclipped_run_equals_one_process(runs: Runs) -> None:
    runs.check("sft", max_grad_norm=0.0)


def test_checkpoint_writes_latest_last_and_model_opens_in_plain_transformers(runs: Runs, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    said = BASE | dict(model=str(runs.folder), stage="stage2", data_path=runs.data["stage2"], num_workers=0)
    said |= dict(save_model_path=tmp_path / "out", cache_dir=runs.scratch / "cache", warmup_steps=0)
    checkpoints = tmp_path / "checkpoints"
    found, other = runs.group.run(_save, said, checkpoints)

    assert found["latest"] == other["latest"] == ["global_step1"]
    assert json.loads((checkpoints / "global_step1" / "mirage_state.json").read_text()) == {"step": 1, "world_size": 2}
    last = (checkpoints / "latest").stat().st_mtime_ns
    written = [path for path in (checkpoints / "global_step1").rglob("*") if path.is_file()]
    # Each rank's optimizer states and weights, and the state file.
    assert len(written) >= 5
    assert all(path.stat().st_mtime_ns <= last for path in written)

    plain, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    before = load_file(runs.folder / "model.safetensors")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == before.keys()
    opened = {public_name(name): p.detach().numpy() for name, p in plain.named_parameters()}
    for name, weight in saved.items():
        wanted = before[name].numpy() if name.startswith("visual.") else found["weights"][name]
        assert np.array_equal(weight.numpy(), wanted)
        assert np.array_equal(opened[name], wanted)
    assert any(not np.array_equal(saved[name].numpy(), before[name].numpy()) for name in saved)


# This one kills the group, so it stands last.


def test_group_names_the_rank_that_hangs(group: Group) -> None:
    group.run(_nothing)
    with pytest.raises(GroupFailure) as failure:
        group.run(_hang, timeout_s=2)
    assert "rank 1: no answer within 2 s: it hangs" in str(failure.value)
    assert "rank 0" not in str(failure.value)
    assert not group.ranks
