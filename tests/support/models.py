"""Small models for tests."""

from __future__ import annotations

import shutil
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


def untie(folder: Path, out: Path) -> Path:
    """Copy a model with one matrix for embedding and head; the copy has an output matrix of its own."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2_5_VLConfig

    shutil.copytree(folder, out)
    config = Qwen2_5_VLConfig.from_pretrained(out)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config.save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).clone()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out
