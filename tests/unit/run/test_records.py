"""What a run's planner is told of its rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mirage_ds.config.run import RunConfig
from mirage_ds.run.records import make_planner


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
