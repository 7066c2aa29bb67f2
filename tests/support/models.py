"""Small models for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def make_nano(out: Path, layers: int = 4, name: str = "nano") -> Path:
    """Make a random nano model, or another small preset, whose tokenizer knows the samples' text."""
    from mirage_ds.model.init import init_model
    from mirage_ds.model.presets import PRESETS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS[name]["text_config"], "num_hidden_layers", layers)
        init_model(name, out, texts=[REPO / "data/sample.jsonl", REPO / "data/sample_planning.jsonl"])
    return out
