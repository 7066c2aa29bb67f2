"""Other families than Qwen2.5-VL through every stage on two ranks under ZeRO-3, and back into plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support.group import Group
from support.models import make_nano
from transformers import AutoModelForImageTextToText

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.run.settings import Run

SETTINGS: dict[str, Any] = dict(
    latent_size=2, global_batch_size=6, micro_batch_tokens=8192, max_steps=2, warmup_steps=0, learning_rate=1e-3,
    num_workers=0, report_to=["none"],
)  # fmt: skip


def _train(world: Any, settings: dict[str, Any]) -> None:
    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    train.train(run, data, learner)
    learner.engine.destroy()


@pytest.mark.parametrize(
    ("name", "first"), [("nano-qwen2-vl", "model.embed"), ("nano-qwen3-vl", "model.language_model.")]
)
def test_a_family_trains_in_every_stage(group: Group, mixed: Path, tmp_path: Path, name: str, first: str) -> None:
    model = make_nano(tmp_path / "base", layers=2, name=name)
    base = SETTINGS | dict(data_path=mixed, cache_dir=tmp_path / "cache", feature_dir=tmp_path / "features")
    # The tower too in stage1, where it encodes helpers as well and rows without a picture stand beside others.
    for stage, more in (
        ("sft", {}),
        ("stage1", {"train_vision": True, "skip_bad_records": True, "max_bad_share": 1.0}),
        ("stage2", {}),
    ):
        out = tmp_path / stage
        settings = base | more | dict(model=str(model), stage=stage, save_model_path=out)
        group.run(_train, settings, timeout_s=200)
        log = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in log if "loss" in line]
        assert len(losses) == 2
        assert losses[1] < losses[0]
        model = out
    _, told = AutoModelForImageTextToText.from_pretrained(model, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with safe_open(model / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    with safe_open(tmp_path / "base/model.safetensors", "pt") as tensors:
        assert names == set(tensors.keys())
    assert any(one.startswith(first) for one in names)
