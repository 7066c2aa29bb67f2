"""What a run's planner is told of its rows, and its user of the model it starts from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mirage_ds.config.run import RunConfig
from mirage_ds.engine.spelling import Base
from mirage_ds.model.loss import StepCounts
from mirage_ds.run.records import longest_block, make_evaluation, make_planner
from mirage_ds.run.setup import other_latents
from mirage_ds.run.step import step_counts


@pytest.mark.parametrize(
    ("stage", "slots", "passes"),
    [("stage2", "latents", [9, 1, 5]), ("stage1", "latents", [1, 1, 1]), ("stage1", "auxiliary", [2, 2, 2])],
)
def test_the_planner_knows_how_many_passes_each_row_needs(
    stage: Any, slots: Any, passes: list[int], tmp_path: Path
) -> None:
    places = {"data_path": tmp_path, "save_model_path": tmp_path}
    config = RunConfig(model="any", stage=stage, slots=slots, latent_size=4, **places)
    blocks = np.array([2, 0, 1])
    index: Any = SimpleNamespace(runs=blocks, tokens=blocks + 9, row_ids=np.arange(3), patches=blocks)
    world: Any = SimpleNamespace(size=1)
    found = make_planner(config, index, world).passes
    assert found is not None
    assert found.tolist() == passes


@pytest.mark.parametrize(
    ("stage", "base", "warns"),
    [
        ("stage2", {"mirage": {"stage": "stage1", "latent_size": 4}}, True),
        # As the public code writes it.
        ("stage2", {"latent_size": 4}, True),
        ("stage2", {"mirage": {"stage": "stage1", "latent_size": 2}}, False),
        ("stage1", {"mirage": {"stage": "sft", "latent_size": 4}}, False),
        ("sft", {"mirage": {"stage": "stage1", "latent_size": 4}}, False),
        ("stage1", {}, False),
        # Of regions it is the longest.
        ("stage1", {"mirage": {"stage": "stage1", "latent_size": 4, "compress_strategy": "region"}}, False),
    ],
)
def test_another_length_of_blocks_than_before_is_said(stage: Any, base: Any, warns: bool, tmp_path: Path) -> None:
    config = RunConfig(model="any", stage=stage, latent_size=2, data_path=tmp_path, save_model_path=tmp_path)
    said = list(other_latents(config, Base(base, None, {})))
    wanted = "warning: the model was trained with --latent_size 4, this run has 2"
    assert said == ([wanted] if warns else [])


def test_a_step_counts_latents_that_differ_from_row_to_row(tmp_path: Path) -> None:
    latents, rows = np.array([9, 0, 1, 4]), np.array([2, 3, 5, 8])
    index: Any = SimpleNamespace(row_ids=rows, labels=latents + 3, latents=latents, tokens=latents + 7)
    plan: Any = SimpleNamespace(rows=[8, 2])
    assert step_counts(index, plan) == (StepCounts(2, 19, 13), [11, 16])
    loader: Any = SimpleNamespace(planner=SimpleNamespace(packed=lambda places: []))
    assert make_evaluation(loader, index).counts == StepCounts(4, 26, 14)
    given = {"model": "any", "stage": "stage1", "data_path": tmp_path, "save_model_path": tmp_path}
    lengths = [longest_block(RunConfig(**given, compress_strategy=one), index) for one in ("average", "region")]
    assert lengths == [4, 9]
