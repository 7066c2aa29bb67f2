"""Latents that are made together, as runs: ZeRO-3 on two ranks against one, resumed, exported, decoded while training.

Every run is train.py's own `train`; what is compared is what it leaves on the disk.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.group import Group
from support.on_disk import log_of
from test_scaffold_ranks import BASE, STEPS, K, Runs, assert_near

from mirage_ds.data.images import ImageFinder
from mirage_ds.engine.save import export_folder
from mirage_ds.evaluate.decoder import load_decoder
from mirage_ds.files import HEADS
from mirage_ds.model.latents import INPUTS

TOGETHER: dict[str, Any] = dict(stage="stage2", latent_passes=1)


@pytest.fixture(scope="module")
def runs(nano: Path, helped: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    scratch = tmp_path_factory.mktemp("together")
    return Runs(BASE | dict(model=str(nano), data_path=helped, cache_dir=scratch / "cache"), scratch)


@pytest.fixture(scope="module")
def trained(runs: Runs, group: Group) -> Path:
    out = runs.scratch / "trained"
    more = dict(eval_data_path=runs.base["data_path"], eval_every=2, eval_decode=2, eval_new_tokens=8)
    assert runs.train(group, out, **TOGETHER, **more, resume="auto") is None
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / HEADS)


def test_two_ranks_are_one_and_the_inputs_are_trained(
    runs: Runs, group: Group, one_rank: Group, trained: Path, tmp_path: Path
) -> None:
    assert runs.train(one_rank, tmp_path / "one", **TOGETHER) is None
    assert_near(tensors(trained), tensors(tmp_path / "one"))
    for first, second in zip(log_of(trained), log_of(tmp_path / "one"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    said = json.loads((trained / "config.json").read_text())["mirage"]
    assert (said["latent_passes"], said["latent_size"]) == (1, K)
    inputs = load_file(trained / HEADS)[INPUTS]
    # All slots began as one embedding.
    assert not torch.equal(inputs[0], inputs[1])
    found = load_decoder(trained, ImageFinder(())).loaded.model.latent_inputs
    assert torch.equal(found.weight, inputs)
    assert found.passes == 1


def test_resumed_is_not_stopped_and_other_passes_are_another_run(
    runs: Runs, group: Group, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(trained / "run/checkpoints/global_step2", out / "run/checkpoints/global_step2")
    (out / "run/checkpoints/latest").write_text("global_step2")
    (out / "run/log.jsonl").write_text("")
    said = runs.train(group, out, stage="stage2", latent_passes=2, resume="auto")
    assert said is not None
    assert "--latent_passes" in said
    assert runs.train(group, out, **TOGETHER, resume="auto") is None
    one, other = tensors(out), tensors(trained)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_exported_checkpoint_is_the_saved_folder(trained: Path, tmp_path: Path) -> None:
    export_folder(trained / f"run/checkpoints/global_step{STEPS}", tmp_path / "out", None, None)
    one, other = tensors(tmp_path / "out"), tensors(trained)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    notes = [json.loads((folder / "config.json").read_text())["mirage"] for folder in (tmp_path / "out", trained)]
    assert notes[0] == notes[1]


def test_stage2_goes_on_with_the_inputs_of_stage1(runs: Runs, group: Group, tmp_path: Path) -> None:
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    assert runs.train(group, stage1, stage="stage1", feed="own", latent_passes=0) is None
    small = dict(load_model_path=stage1, learning_rate=1e-12)
    assert runs.train(group, stage2, stage="stage2", latent_passes=2, **small) is None
    one, other = load_file(stage1 / HEADS)[INPUTS], load_file(stage2 / HEADS)[INPUTS]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert not torch.equal(one[0], one[1])
    # Without the flag latents are made in turn again, and the folder says so.
    assert runs.train(group, tmp_path / "turn", stage="stage2", **small) is None
    assert not (tmp_path / "turn" / HEADS).exists()
    assert "latent_passes" not in json.loads((tmp_path / "turn" / "config.json").read_text())["mirage"]
