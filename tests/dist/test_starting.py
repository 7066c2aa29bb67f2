"""Starting on two ranks: the weights are read by one of them, and collectives are bounded once training runs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.group import Group

from mirage_ds.engine.private import set_collective_timeout


def _load(world: Any, folders: list[str]) -> dict[str, torch.Tensor]:
    """Load the language model under ZeRO-3 from this rank's folder; its whole weights."""
    import deepspeed

    from mirage_ds.model.load import load_model

    block = {"stage": 3, "stage3_param_persistence_threshold": 0}
    values = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": block}
    loaded = load_model(
        Path(folders[world.rank]), stage="sft", dtype=torch.float32, device=world.device, ds_config=values
    )
    named = dict(loaded.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def test_rank_0_alone_reads_the_language_model(own_group: Group, nano: Path, tmp_path: Path) -> None:
    # The other rank's files have the same names and shapes, and nothing in them.
    empty = tmp_path / "empty"
    shutil.copytree(nano, empty)
    for file in empty.glob("*.safetensors"):
        blank = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(blank, file, metadata={"format": "pt"})
    first, second = own_group.run(_load, [str(nano), str(empty)])
    assert len(first) > 20
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor)
    assert all(first[name].any() for name in first if name.endswith("weight"))


def _wait(world: Any, bound_s: float, gave_up: Path) -> list[tuple[float, str]]:
    """Let rank 0 wait in an all-reduce of the default group and of another, and rank 1 until it has given up.

    How long rank 0 waited, and why no longer.
    """
    import torch.distributed as dist

    other = dist.new_group([0, 1])
    for one in (None, other):
        dist.all_reduce(torch.ones(1), group=one)
    set_collective_timeout(bound_s)
    found = []
    if world.rank == 1:
        while not gave_up.exists():
            time.sleep(0.05)
        return found
    for one in (None, other):
        begun = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1), group=one)
        found.append((time.monotonic() - begun, str(caught.value)))
    gave_up.touch()
    return found


def test_every_collective_is_bounded(own_group: Group, tmp_path: Path) -> None:
    waited, _ = own_group.run(_wait, 2.0, tmp_path / "gave up")
    assert len(waited) == 2
    for seconds, why in waited:
        assert seconds > 1.5
        assert "imed out" in why
