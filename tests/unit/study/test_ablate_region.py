"""Regions of the input in a study's chains: what counts as a setting, and what cannot follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.studies import STAGES, opened, write_study

from mirage_ds.errors import UserError

REGION = {"region": {"stage": "stage1", "compress_strategy": "region", "latent_loss": "l2"}}


def study(folder: Path, nano: Path, **changed: Any) -> Any:
    evaluations = {"test": {"data_path": "data.jsonl", "controls": "own,zero"}}
    given: dict[str, Any] = dict(stages=STAGES | REGION, seeds=[0], evaluations=evaluations) | changed
    return opened(write_study(folder, nano, **given))[0]


def test_k_is_idle_and_no_controls_follow(tmp_path: Path, nano: Path) -> None:
    arms = {
        "region": {"chain": ["base", "region"]},
        "same": {"chain": ["base", "region"], "settings": {"region.latent_size": 8, "region.helper_max_pixels": 9999}},
        "pooled": {"chain": ["base", "stage1"]},
    }
    made = study(tmp_path, nano, arms=arms)
    region, same, pooled = made.cells
    assert region.stages == same.stages
    assert made.nodes[region.stages[-1]].config.compress_strategy == "region"
    controls = [node for node in made.nodes.values() if node.kind == "controls"]
    assert [node.parent for node in controls] == [made.nodes[pooled.stages[-1]]]


def test_stage2_behind_it_is_refused(tmp_path: Path, nano: Path) -> None:
    said = r"arm a, stage stage2: .*--stage stage2: not with --compress_strategy region"
    with pytest.raises(UserError, match=said):
        study(tmp_path, nano, arms={"a": {"chain": ["region", "stage2"]}})
