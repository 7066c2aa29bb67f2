"""Offloading on two ranks: the losses of plain ZeRO-3, and the bytes on disk and in memory that the check counts.

nano's matrices are below the 1 MiB that DeepSpeed swaps at least: `wide` has an embedding and MLPs above it.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from support.extensions import compiled
from support.group import Group, GroupFailure

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.engine.checkpoint import save_checkpoint
from mirage_ds.engine.offload import check_offload
from mirage_ds.engine.offload_bytes import files_of, memory_of, read_keys
from mirage_ds.engine.swap_folders import claim_folders
from mirage_ds.errors import UserError
from mirage_ds.model.load import public_name
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run

# Two of DeepSpeed's extensions are compiled first.
pytestmark = pytest.mark.slow
# 8,704 · 128 elements: 2.2 MB on each of two ranks in fp32, 1.1 MB in bf16.
WIDE = 8704
LARGEST = WIDE * 128 // 2
# Elements of two layers' matrices: q and o, k and v, the MLP.
TWO_LAYERS = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * WIDE)
BASE: dict[str, Any] = dict(
    stage="stage2", latent_size=2, global_batch_size=4, micro_batch_size=1, max_steps=3, warmup_steps=0,
    lr_scheduler="constant", learning_rate=1e-3, adam_eps=1e-3, num_workers=0, report_to=["none"],
)  # fmt: skip
# Rounding of fp32 in another order (torch's AdamW against DeepSpeed's), three steps on.
FP32 = 1e-6


@pytest.fixture(scope="module")
def wide(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano with WIDE vocabulary rows and WIDE inner columns."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "wide"
    shutil.copytree(nano, folder)
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = config.text_config.intermediate_size = WIDE
    config.save_pretrained(folder)
    torch.manual_seed(0)
    named = Qwen2_5_VLForConditionalGeneration(config).named_parameters()
    weights = {public_name(name): p.detach().contiguous() for name, p in named}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _train(world: Any, settings: dict[str, Any], checked: bool) -> dict[str, Any]:
    """Train through open_run and step; losses, and what this rank holds of offloaded things."""
    config = RunConfig(**settings)
    with nullcontext() if checked else mock.patch("mirage_ds.run.settings.check_offload"):
        run = Run(config, world)
        data, learner = train.open_run(run)
    losses = []
    for plan, batches in data.loader.steps(0, data.steps):
        taken = steps.step(run, data, learner, plan, batches)
        assert taken.applied
        losses.append(taken.metrics["loss"])
    optimizer = learner.engine.optimizer
    groups: list[list[int]] = [[], []]
    for p in learner.engine.module.parameters():
        groups[len(p.ds_shape) == 1].append(p.ds_numel)
    found = dict(losses=losses, adam=type(optimizer.optimizer).__name__, groups=groups, locked=0)
    found["sums"] = optimizer.grad_partitions_flat_buffer.nbytes
    swapper = optimizer.fp16_groups[0][0].nvme_swapper
    if swapper is not None:
        found["locked"] += swapper.buffers.nbytes + swapper.partitioned_swap_buffer.nbytes
    if optimizer.optimizer_swapper is not None:
        found["locked"] += sum(one.nbytes for one in optimizer.optimizer_swapper.swap_buffer_manager.all_buffers)
    files = Path(settings["cache_dir"]).parent.rglob(f"rank{world.rank}/*.swp")
    sizes = {str(file.relative_to(file.parents[1])): file.stat().st_size for file in files}
    found["weights"] = sum(size for name, size in sizes.items() if "_param" in name)
    found["states"] = sum(size for name, size in sizes.items() if "_param" not in name and "_gradient_" not in name)
    found["gradients"] = sum(size for name, size in sizes.items() if "_gradient_" in name)
    found["checkpoint"] = save_checkpoint(learner.engine, config.save_model_path / "checkpoints", {"step": 3}, 1, world)
    learner.engine.destroy()
    return found


class Runs:
    """Runs JSONs, each once."""

    def __init__(self, group: Group, folder: Path, data: Path, scratch: Path):
        self.group, self.folder, self.data, self.scratch = group, folder, data, scratch
        self.made: dict[str, list[dict[str, Any]]] = {}

    def json(self, name: str, torch_adam: bool | None = None, **zero: Any) -> Path:
        values: dict[str, Any] = {
            "zero_optimization": {
                "stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                "sub_group_size": 1_500_000,
            } | zero
        }  # fmt: skip
        if torch_adam is not None:
            values["optimizer"] = {"type": "AdamW", "params": {"torch_adam": torch_adam}}
        path = self.scratch / f"{name}.json"
        path.write_text(json.dumps(values))
        return path

    def run(self, name: str, torch_adam: bool | None = None, checked: bool = True, **zero: Any) -> list[dict[str, Any]]:
        if name not in self.made:
            place = self.scratch / name
            settings = BASE | dict(
                model=str(self.folder), data_path=self.data, save_model_path=place / "out", cache_dir=place / "cache",
                feature_dir=self.scratch / "features", save_every=zero.pop("save_every", None),
                deepspeed=self.json(name, torch_adam, **zero),
            )  # fmt: skip
            self.made[name] = self.group.run(_train, settings, checked, timeout_s=240)
        return self.made[name]

    def losses(self) -> list[float]:
        return self.run("plain")[0]["losses"]


@pytest.fixture(scope="module")
def runs(group: Group, wide: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    # Before the ranks start: they inherit where the extensions are.
    compiled("CPUAdamBuilder", "AsyncIOBuilder")
    return Runs(group, wide, mixed, tmp_path_factory.mktemp("offload"))


CPU: dict[str, Any] = {"device": "cpu", "pin_memory": False}


def nvme(folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True, parents=True)
    weights = dict(buffer_count=2, buffer_size=LARGEST, max_in_cpu=0)
    common = dict(device="nvme", nvme_path=str(folder), pin_memory=False)
    return dict(offload_param=common | weights, offload_optimizer=common | dict(buffer_count=4))


@pytest.mark.parametrize(
    ("name", "zero", "torch_adam", "adam"),
    [
        # Both at once with torch's AdamW is what the shipped twins do (test_ds_configs.py).
        ("parameters", dict(offload_param=CPU), None, "AdamW"),
        ("both", dict(offload_param=CPU, offload_optimizer=CPU), None, "DeepSpeedCPUAdam"),
    ],
)
def test_losses_of_cpu_offload(runs: Runs, name: str, zero: dict[str, Any], torch_adam: bool | None, adam: str) -> None:
    for found in runs.run(name, torch_adam, **zero):
        assert found["losses"] == pytest.approx(runs.losses(), rel=FP32)
        assert found["adam"] == adam
        assert found["locked"] == 0
        assert found["checkpoint"].is_dir()


def test_nvme_losses_files_and_memory(runs: Runs) -> None:
    name = "nvme"
    zero = nvme(runs.scratch / name / "disk")
    keys = read_keys(json.loads(runs.json(name, **zero).read_text()))
    for found in runs.run(name, **zero):
        assert found["losses"] == pytest.approx(runs.losses(), rel=FP32)
        files, memory = files_of(keys, found["groups"], 2), memory_of(keys, found["groups"], 2)
        # 13 matrices of 557,056 elements on a rank; and the output matrix that transformers makes before it ties it to
        # the embedding, whose file stays.
        assert files.weights == 13 * LARGEST * 4
        assert found["weights"] == 14 * LARGEST * 4
        assert (files.states, files.gradients) == (found["states"], found["gradients"])
        assert memory.locked == found["locked"]
        assert memory.total == found["locked"] + found["sums"]
        # One that could not be restored is not written.
        assert found["checkpoint"] == "DeepSpeed cannot restore one whose states or parameters are on NVMe"
    assert not list((runs.scratch / name / "disk").glob("mirage_ds-*"))
    with pytest.raises(GroupFailure, match="cannot restore a checkpoint of a run"):
        runs.run(f"{name}_saving", save_every=1, **zero)


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("few", dict(stage3_max_reuse_distance=TWO_LAYERS), "Not enough buffers"),
        (
            "ahead",
            dict(
                stage3_max_reuse_distance=TWO_LAYERS,
                stage3_max_live_parameters=TWO_LAYERS,
                stage3_prefetch_bucket_size=5 * 10**7,
            ),
            "already assigned swap buffer",
        ),
    ],
)
def test_deepspeed_still_dies_of_what_is_refused(runs: Runs, name: str, changed: dict[str, Any], words: str) -> None:
    zero = nvme(runs.scratch / name / "disk")
    # A layer's three swapped matrices stay: four buffers are the least, three too few.
    zero["offload_param"]["buffer_count"] = 3 if name == "few" else 9
    with pytest.raises(GroupFailure, match=words):
        runs.run(name, checked=False, **zero, **changed)


# ----------------------------------------------------------------------------------------------------- on all ranks


def _refused(world: Any, folder: Path, changed: dict[str, Any]) -> str | None:
    zero: dict[str, Any] = {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    zero |= nvme(folder)
    zero["offload_param"] |= changed
    try:
        check_offload(
            {"zero_optimization": zero}, Path("x.json"), [[2 * LARGEST]], [2 * LARGEST], world, checkpoints=False
        )
    except UserError as error:
        return str(error)
    return None


def _claim(world: Any, folder: Path) -> tuple[str, bool]:
    values = {"zero_optimization": nvme(folder)}
    changed, swap = claim_folders(values, world)
    own = Path(changed["zero_optimization"]["offload_param"]["nvme_path"])
    assert changed["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(own)
    (own / f"{world.rank}.tensor.swp").write_text("x")
    there = own.is_dir()
    swap.release()
    return str(own), there


def test_every_rank_is_refused_alike(runs: Runs, tmp_path: Path) -> None:
    assert runs.group.run(_refused, tmp_path, {}) == [None, None]
    one, other = runs.group.run(_refused, tmp_path, {"buffer_size": LARGEST - 1})
    assert one == other
    assert f"write {LARGEST} or more" in str(one)


def test_each_run_has_a_folder_of_its_own_and_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    first = runs.group.run(_claim, tmp_path)
    second = runs.group.run(_claim, tmp_path)
    assert first[0] == first[1]
    assert first[0] != second[0]
    assert all(there for _, there in first + second)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
