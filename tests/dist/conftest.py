"""Fixtures of the tests on several ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.group import Group

from mirage_ds.model.init import init_model
from mirage_ds.model.presets import PRESETS

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """Two ranks for the tests of one file."""
    made = Group()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with two of its four layers: ranks spend most of their time in DeepSpeed's hooks around each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS["nano"]["text_config"], "num_hidden_layers", 2)
        out = tmp_path_factory.mktemp("models") / "nano"
        init_model("nano", out, texts=[REPO / "data/sample.jsonl", REPO / "data/sample_planning.jsonl"])
    return out


@pytest.fixture(scope="session")
def helped(mixed: Path) -> Path:
    """The rows of `mixed` that stage1 can use."""
    rows = [line for line in mixed.read_text().splitlines() if "image_output" in json.loads(line)]
    path = mixed.parent / "helped.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path
