"""Models of other families than Qwen2.5-VL for the oracles, and what their plain text models want besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mirage_ds.data.sample import Sample
from mirage_ds.model.init import init_model

REPO = Path(__file__).parents[2]
OTHERS = ("nano-qwen2-vl", "nano-qwen3-vl")


def write(name: str, folder: Path) -> Path:
    """Write a small model of a family, whose tokenizer knows the samples' text."""
    init_model(name, folder, texts=[REPO / "data/sample.jsonl", REPO / "data/sample_planning.jsonl"])
    return folder


def deep_inputs(model: Any, sample: Sample, length: int) -> dict[str, Any]:
    """Return what Qwen3-VL's text model wants besides, of the images among a row's first `length` tokens."""
    if model.config.model_type != "qwen3_vl" or not len(sample.image_grid_thw):
        return {}
    found = model.model.get_image_features(sample.pixel_values, sample.image_grid_thw, return_dict=True)
    here = torch.zeros(1, length, dtype=torch.bool)
    seen = sample.input_ids[:length] == model.config.image_token_id
    here[0, : len(seen)] = seen
    # A tensor of all images; since transformers 5.18 one of each image.
    each = [one if isinstance(one, torch.Tensor) else torch.cat(one) for one in found.deepstack_features]
    embeds = [one[: here.sum()] for one in each]
    return {"visual_pos_masks": here, "deepstack_visual_embeds": embeds}
