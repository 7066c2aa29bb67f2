"""The planner's model states against the engine's own tensors, to the byte, on two and four ranks.

Ψ elements of the trained parameters, W ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.group import Group
from torch.utils._pytree import tree_leaves

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.checkpoint import CheckpointWriter
from mirage_ds.plan.settings import read_settings
from mirage_ds.plan.shape import read_shape, sizes, trained_parameters
from mirage_ds.plan.states import States, states, written
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run

BF16 = {"bf16": {"enabled": True}}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
STATES = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
# Nano's vectors have 64 to 128 elements and its matrices 8,192 and more.
PERSISTENT = 1000
SHARDED = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": PERSISTENT}
SHARDED |= {"reduce_bucket_size": 70_000}
HOST = {"device": "cpu", "pin_memory": False}
FLAT = {"overlap_comm": False, "reduce_bucket_size": 70_000}
# One row a micro-batch: two micro-steps on two ranks, one on four.
ROWS = 4
CASES: dict[str, dict[str, Any]] = {
    # Of these only what a checkpoint writes.
    "zero0 fp32": {},
    "zero0 bf16": BF16,
    "zero3 fp32": {"zero_optimization": SHARDED},
    "zero3 fp32, in parts": {"zero_optimization": SHARDED | {"sub_group_size": 90_000}},
    "zero3 bf16": {**BF16, **SUMS, "zero_optimization": SHARDED},
    "zero3 bf16 sums": {**BF16, "zero_optimization": SHARDED | {"stage3_param_persistence_threshold": 0}},
    "zero3 bf16 states": {**STATES, "zero_optimization": SHARDED},
    "zero3 fp32, offloaded": {
        "zero_optimization": SHARDED | {"offload_param": HOST, "offload_optimizer": HOST},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    },
    "zero2 fp32": {"zero_optimization": {"stage": 2, **FLAT}},
    "zero2 bf16": {**BF16, **SUMS, "zero_optimization": {"stage": 2, **FLAT}},
    "zero2 bf16 sums": {**BF16, "zero_optimization": {"stage": 2, **FLAT}},
    "zero2 bf16 states": {**STATES, "zero_optimization": {"stage": 2, **FLAT}},
    "zero1 fp32": {"zero_optimization": {"stage": 1, **FLAT}},
    "zero1 bf16": {**BF16, **SUMS, "zero_optimization": {"stage": 1, **FLAT}},
    "zero1 bf16 sums": {**BF16, "zero_optimization": {"stage": 1, **FLAT}},
}


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    made = Group(2)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def four() -> Iterator[Group]:
    made = Group(4)
    yield made
    made.stop()


# ------------------------------------------------------------------------------------------------------ on the ranks


def _bytes(tensors: Any) -> int:
    """Bytes of the unique storages behind the tensors."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for address, size in found.items() if address)


def _run(world: Any, settings: dict[str, Any]) -> dict[str, int]:
    """Take one optimizer step and count the tensors that the engine holds."""
    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    engine = learner.engine
    if engine.zero_optimization_stage() == 0:
        for plan, batches in data.loader.steps(0, 1):
            steps.step(run, data, learner, plan, batches)
        return _written(learner, config.save_model_path, world)
    optimizer, inner = engine.optimizer, engine.optimizer.optimizer
    counted: dict[str, int] = {}
    take, backward, whole = engine.step, engine.backward, []

    def step() -> None:
        counted["gradients"] = _gradients(engine)
        take()

    def counted_backward(loss: Any) -> None:
        backward(loss)
        whole.append(_bytes([p.grad for p in engine.module.parameters() if p.grad is not None]))

    engine.step, engine.backward = step, counted_backward
    for plan, batches in data.loader.steps(0, 1):
        steps.step(run, data, learner, plan, batches)
    state = [value for one in inner.state.values() for value in one.values() if getattr(value, "ndim", 0)]
    counted["moments"] = _bytes(state)
    counted |= _after_step(engine, optimizer)
    # Of the micro-steps but the last, whose gradients are reduced at once.
    counted["whole"] = max(whole[:-1], default=0)
    return counted | _written(learner, config.save_model_path, world)


def _written(learner: Any, folder: Path, world: Any) -> dict[str, int]:
    """Write a checkpoint; bytes of this rank's files, and of the weights and all else in them but counters."""
    saved = CheckpointWriter(learner.engine, folder / "checkpoints", learner.state | {"step": 1}, world).finish(1)
    learner.engine.destroy()
    assert not isinstance(saved, str)
    weights, others = [], []
    # Rank 0 alone writes what has no rank in its name.
    for file in saved.place.glob("*.pt"):
        if f"pp_rank_{world.rank}_" in file.name or (world.rank == 0 and "pp_rank" not in file.name):
            content = torch.load(file, weights_only=False)
            weights += filter(torch.is_tensor, tree_leaves(content.get("module")))
            rest = {name: value for name, value in content.items() if name != "module"}
            others += filter(torch.is_tensor, tree_leaves(rest))
    size = sum(file.stat().st_size for file in saved.place.glob("*.pt"))
    assert saved.size == size
    return {"file": saved.own, "weights": _bytes(weights), "optimizer": _bytes(t for t in others if t.ndim)}


def _gradients(engine: Any) -> int:
    """Count the gradients that wait for the optimizer."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return _bytes([optimizer.grad_partitions_flat_buffer])
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return _bytes(optimizer.fp32_groups_gradients_flat)
    return sum(tensor.nbytes for group in optimizer.averaged_gradients.values() for tensor in group)


def _after_step(engine: Any, optimizer: Any) -> dict[str, int]:
    """Count weights: what this rank computes with and what its optimizer moves."""
    parameters = list(engine.module.parameters())
    if engine.zero_optimization_stage() == 3:
        own = {tensor.untyped_storage().data_ptr() for tensor in (p.ds_tensor for p in parameters)}
        masters = optimizer.fp32_partitioned_groups_flat
        assert not own & {tensor.untyped_storage().data_ptr() for tensor in masters}
        persistent = [p.data for p in parameters if p.ds_persist]
        buckets = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        return {
            "parameters": _bytes([p.ds_tensor for p in parameters]),
            "master": _bytes(masters),
            "persistent": sum(tensor.nbytes for tensor in persistent),
            "bucket": _bytes(buckets),
        }
    flat = hasattr(optimizer, "bf16_groups_flat")
    return {
        "parameters": _bytes(parameters),
        "master": _bytes(optimizer.fp32_groups_flat_partition if flat else optimizer.single_partition_of_fp32_groups),
    }


# --------------------------------------------------------------------------------------------------------- the tests


def named(found: States, word: str) -> int:
    return sum(size for name, size in {**found.gpu, **found.host}.items() if name.startswith(word))


def check(group: Group, case: str, nano: Path, data: Path, scratch: Path) -> None:
    path = scratch / f"{case.replace(' ', '_')}.json"
    path.write_text(json.dumps(CASES[case]))
    said = dict(
        model=str(nano), stage="stage2", data_path=data, save_model_path=scratch / "out", overwrite=True, latent_size=2,
        global_batch_size=ROWS, micro_batch_size=1, max_steps=1, warmup_steps=0, num_workers=0, report_to=["none"],
        deepspeed=path, cache_dir=scratch / "cache",
    )  # fmt: skip
    shape = read_shape(str(nano))
    settings = read_settings(ds.read_json(path), path, sizes(shape))
    # At nano's size the last pass has a backward of its own.
    planned = states(trained_parameters(shape), settings, group.size, micro_steps=2 * ROWS // group.size)
    files = written(trained_parameters(shape), settings, group.size)
    for rank, counted in enumerate(group.run(_run, said, timeout_s=240)):
        assert counted["weights"] == (0 if rank else files.weights)
        assert counted["optimizer"] == (files.optimizer if rank < files.ranks else 0)
        # Names, counters, where each slice of a parameter lies.
        assert 0 <= counted["file"] - counted["weights"] - counted["optimizer"] < 50_000
        if settings.stage == 0:
            continue
        assert counted["parameters"] == named(planned, "parameters")
        sums = named(planned, "gradients, whole sums") or named(planned, "gradients, summed")
        assert counted["gradients"] == sums
        if settings.stage == 1:
            whole = "whole gradients of a micro-step" if settings.whole_sums else "gradients, whole, until the last"
            assert counted["whole"] == named(planned, whole)
        assert counted["master"] == named(planned, "master weights")
        assert counted["moments"] == named(planned, "moments")
        if settings.stage == 3:
            assert counted["persistent"] == named(planned, "weights that stay")
            assert counted["bucket"] == named(planned, "bucket")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_hold_what_is_planned(two: Group, case: str, nano: Path, mixed: Path, tmp_path: Path) -> None:
    check(two, case, nano, mixed, tmp_path)


# On two cores four ranks take half a minute to start.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero3 fp32", "zero3 bf16", "zero2 bf16", "zero1 bf16", "zero1 fp32"])
def test_four_ranks_hold_what_is_planned(four: Group, case: str, nano: Path, mixed: Path, tmp_path: Path) -> None:
    check(four, case, nano, mixed, tmp_path)
