"""scaffold and learned targets as runs: ZeRO-3 on two ranks against one, with and without kept features, resumed.

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
from test_resume import _train

from mirage_ds.engine.save import export_folder
from mirage_ds.errors import UserError

K, STEPS = 2, 4
# 6 rows, 3 a step, one a micro-step: on two ranks one is idle in every other micro-step.
BASE: dict[str, Any] = dict(
    latent_size=K, global_batch_size=3, micro_batch_size=1, max_steps=STEPS, warmup_steps=1, learning_rate=3e-3,
    # As in test_zero3: a step of AdamW that is a smooth function of the gradient.
    adam_eps=1e-3, num_workers=0, report_to=["none"], save_every=2, keep_checkpoints=3,
)  # fmt: skip
LEARNED = "latent_targets.safetensors"


class Runs:
    def __init__(self, base: dict[str, Any], scratch: Path):
        self.base, self.scratch = base, scratch

    def train(self, group: Group, out: Path, **settings: Any) -> str | None:
        said = group.run(_train, self.base | dict(save_model_path=out) | settings, timeout_s=180)
        assert len(set(said)) == 1
        return said[0]


@pytest.fixture(scope="module")
def runs(nano: Path, helped: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    scratch = tmp_path_factory.mktemp("scaffold")
    return Runs(BASE | dict(model=str(nano), data_path=helped, cache_dir=scratch / "cache"), scratch)


@pytest.fixture(scope="module")
def learned(runs: Runs, group: Group) -> Path:
    """Targets that two ranks have learnt; a checkpoint of step 2."""
    out = runs.scratch / "learned"
    more = dict(eval_data_path=runs.base["data_path"], eval_every=2, save_best="loss")
    assert runs.train(group, out, stage="scaffold", resume="auto", **more) is None
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / LEARNED)


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5, msg=name)


def test_it_trains_the_encoder_alone_and_saves_no_model(learned: Path, nano: Path) -> None:
    assert not (learned / "config.json").exists()
    note = json.loads((learned / "latent_targets.json").read_text())
    assert (note["k"], note["width"], note["model_type"], note["step"]) == (K, 128, "qwen2_5_vl", STEPS)
    assert note["sources"] == [str(nano)]
    assert tensors(learned).keys() == {"queries", "key.weight", "value.weight", "out.weight", "norm.weight"}
    lines = log_of(learned)
    assert len({line["loss"] for line in lines}) == STEPS
    assert all(line["loss"] == line["ce"] and "sim" not in line for line in lines)
    losses = {line["step"]: line["eval_loss"] for line in log_of(learned, evaluations=True)}
    best = json.loads((learned / "best" / "best.json").read_text())
    assert best["value"] == min(losses.values()) == losses[best["step"]]
    assert (learned / "best" / LEARNED).is_file()


@pytest.mark.parametrize("train_vision", [False, True])
def test_two_ranks_are_one(
    runs: Runs, group: Group, one_rank: Group, learned: Path, tmp_path: Path, train_vision: bool
) -> None:
    two, one = learned, tmp_path / "one"
    if train_vision:
        two = tmp_path / "two"
        assert runs.train(group, two, stage="scaffold", train_vision=True) is None
    assert runs.train(one_rank, one, stage="scaffold", train_vision=train_vision) is None
    assert_near(tensors(two), tensors(one))
    assert any(name.startswith("visual.") for name in tensors(two)) == train_vision
    for first, second in zip(log_of(two), log_of(one), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)


def test_resumed_is_not_stopped(runs: Runs, group: Group, learned: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(learned / "run/checkpoints/global_step2", out / "run/checkpoints/global_step2")
    (out / "run/checkpoints/latest").write_text("global_step2")
    (out / "run/log.jsonl").write_text("".join((learned / "run/log.jsonl").read_text().splitlines(True)[:2]))
    assert runs.train(group, out, stage="scaffold", resume="auto") is None
    assert (out / LEARNED).read_bytes() == (learned / LEARNED).read_bytes()
    assert log_of(out)[-2:] == log_of(learned)[-2:]


def test_features_that_are_kept_change_no_bit(runs: Runs, group: Group, learned: Path, tmp_path: Path) -> None:
    for cache in ("off", "targets"):
        out = tmp_path / cache
        assert runs.train(group, out, stage="scaffold", feature_cache=cache) is None
        assert (out / LEARNED).read_bytes() == (learned / LEARNED).read_bytes()


def test_an_exported_checkpoint_is_the_saved_folder(learned: Path, tmp_path: Path) -> None:
    export_folder(learned / f"run/checkpoints/global_step{STEPS}", tmp_path / "out", None, None)
    one, other = tensors(tmp_path / "out"), tensors(learned)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    notes = [json.loads((folder / "latent_targets.json").read_text()) for folder in (tmp_path / "out", learned)]
    assert [note | {"scores": 0} for note in notes[:1]] == [note | {"scores": 0} for note in notes[1:]]
    with pytest.raises(UserError, match="exists already"):
        export_folder(learned, tmp_path / "out", None, None)


@pytest.mark.parametrize("feed", ["targets", "own"])
def test_stage1_learns_them_on_two_ranks_as_on_one_kept_or_not(
    runs: Runs, group: Group, one_rank: Group, learned: Path, tmp_path: Path, feed: str
) -> None:
    how = dict(stage="stage1", latent_targets=learned, feed=feed, latent_loss="l2", ce_weight=0.5)
    two, one, off = (tmp_path / name for name in ("two", "one", "off"))
    assert runs.train(group, two, **how) is None
    assert runs.train(one_rank, one, **how) is None
    assert runs.train(group, off, **how, feature_cache="off") is None
    assert (off / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    first, second = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    assert_near(first, second)
    for line in log_of(two):
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + line["sim"], rel=1e-5)
    # Other targets than pooled ones: another first loss.
    assert runs.train(group, tmp_path / "pooled", **{**how, "latent_targets": None, "max_steps": 1}) is None
    assert abs(log_of(tmp_path / "pooled")[0]["sim"] - log_of(two)[0]["sim"]) > 1e-3


def test_a_run_goes_on_with_its_own_targets_alone(runs: Runs, group: Group, learned: Path, tmp_path: Path) -> None:
    how, out = dict(stage="stage1", latent_targets=learned), tmp_path / "out"
    assert runs.train(group, out, **how, max_steps=2) is None
    other = tmp_path / "other"
    shutil.copytree(learned / "best", other)
    (other / "latent_targets.json").write_text((other / "latent_targets.json").read_text() + " ")
    note = json.loads((other / "latent_targets.json").read_text()) | {"step": 99}
    (other / "latent_targets.json").write_text(json.dumps(note))
    said = runs.train(group, out, **how | {"latent_targets": other}, resume="auto")
    assert "was written with --latent_targets (SHA-256)" in said
    said = runs.train(group, out, **how, feed="own", resume="auto")
    assert "was written with --feed None, this run has own" in said


def test_records_without_helpers_are_refused(runs: Runs, group: Group, mixed: Path, tmp_path: Path) -> None:
    said = runs.train(group, tmp_path / "out", stage="scaffold", data_path=mixed)
    assert "image_output: " in said
    assert "needs a helper image" in said
    assert not (tmp_path / "out").exists()


def test_targets_of_another_size_are_refused_before_anything(
    runs: Runs, group: Group, learned: Path, tmp_path: Path
) -> None:
    said = runs.train(group, tmp_path / "out", stage="stage1", latent_targets=learned, latent_size=3)
    what = f"--latent_targets {learned}: makes 2 latents a helper, and a block has 3 here"
    assert said == f"{what}; give targets that were learnt with 3"
    assert not (tmp_path / "out").exists()
