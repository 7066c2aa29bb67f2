"""Fixtures of the unit tests: encoders over the nano model, and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support.pictures import noise

from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder

# The same examples on every run: a suite that is red by chance teaches nothing.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=150)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise: wWxH.png for several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for width, height in ((56, 84), (140, 56), (84, 84), (112, 112), (100, 61), (20, 33)):
        noise((width, height), 80).save(folder / f"w{width}x{height}.png")
    return folder


@pytest.fixture(scope="session")
def encoder_for(nano: Path, pictures: Path) -> Callable[..., Encoder]:
    """Make an encoder over the nano model: encoder_for(stage, k, beside=records file, …)."""
    made: dict[Any, Encoder] = {}

    def make(stage: str = "stage1", latent_size: int = 4, beside: Path | None = None, **limits: Any) -> Encoder:
        key = (stage, latent_size, beside, tuple(limits.items()))
        if key not in made:
            finder = ImageFinder.beside(beside or pictures / "rows.jsonl", None)
            made[key] = load_encoder([str(nano)], finder, stage, latent_size, **limits)
        return made[key]

    return make


@pytest.fixture(scope="session")
def untied(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano shape with an output matrix of its own, written by transformers itself."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    out = tmp_path_factory.mktemp("models") / "untied"
    config = AutoConfig.from_pretrained(nano)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(7)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(nano).save_pretrained(out)
    Qwen2VLImageProcessorPil().save_pretrained(out)
    return out


@pytest.fixture
def rows(mixed: Path, tmp_path: Path) -> Path:
    """The mixed rows, and three more: several images, several runs, special tokens spelt out."""
    shutil.copytree(mixed.parent, tmp_path / "data")
    file = tmp_path / "data" / mixed.name
    more = [
        {
            "text_input": "<image> or <image>? Say <|im_end|>.",
            "text_output": "<output_image>a <output_image>b <|latent_pad|>",
            "image_input": ["in0.png", "in1.png"],
            "image_output": ["out2.png", "out3.png"],
        },
        {"text_input": "ä ✓", "text_output": "ö", "other": {"n": [1.5, None]}},
        {"text_input": "q", "text_output": "a", "image_output": "out1.png", "image_input": "in0.png"},
    ]
    file.write_text(file.read_text() + "\n" + "".join(json.dumps(row) + "\n" for row in more))
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
