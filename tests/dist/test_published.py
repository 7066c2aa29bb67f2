"""Folders in published layouts (tests/published.py) through everything that a user does with one.

One folder of each family is in `make test`; all layouts, and the really published files where they are at hand, are
slow.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from group import Group
from on_disk import lines_of
from PIL import Image
from published import LAYOUTS, SPECIAL, Layout, real_layouts, write_layout
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import mirage_ds
from mirage_ds import train
from mirage_ds.ablate.collect import _sizes
from mirage_ds.cli import main
from mirage_ds.config import RunConfig
from mirage_ds.data.images import ImageFinder
from mirage_ds.evaluate import evaluate_file, load_decoder, run_limits
from mirage_ds.export import export_folder
from mirage_ds.prepare import prepare

QUICK = ("qwen2.5-vl-7b", "qwen2-vl-7b", "qwen3-vl-8b")
K, ROWS = 2, 4
TEXTS = ("Where does the way go? Left, left, then right. \\boxed{A}", "system\nYou are a helpful assistant.\nuser\n")
SETTINGS: dict[str, Any] = dict(
    latent_size=K, global_batch_size=ROWS, micro_batch_tokens=4096, max_steps=2, warmup_steps=0, learning_rate=1e-3,
    num_workers=0, report_to=["none"], eval_every=1, eval_decode=2, eval_new_tokens=4, task="boxed",
)  # fmt: skip


def chosen(quick: tuple[str, ...] = QUICK) -> list[Any]:
    return [
        pytest.param(one, id=one.name, marks=[] if one.name in quick else pytest.mark.slow)
        for one in (*LAYOUTS, *real_layouts())
    ]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows, each with a picture and a helper."""
    folder = tmp_path_factory.mktemp("records")
    rows = []
    for number in range(ROWS):
        for name, seed in (("in", 40), ("out", 90)):
            Image.effect_noise((84, 56), seed + number).convert("RGB").save(folder / f"{name}{number}.png")
        rows.append(
            {
                "text_input": "<image>Where does the way go?",
                "text_output": f"First {'left, ' * number}<output_image>then right. \\boxed{{A}}",
                **{"image_input": f"in{number}.png", "image_output": f"out{number}.png"},
            }
        )
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Group]:
    made = Group(1)
    yield made
    made.stop()


def _train(world: Any, runs: list[dict[str, Any]]) -> None:
    """Train one run after the other."""
    for settings in runs:
        config = RunConfig(**settings)
        prepared = prepare(config, world)
        train.train(config, prepared, world)
        prepared.engine.destroy()


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines_of(out) if "loss" in line]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Write a layout's folder, once: `made(layout)`; the folders that give its parts, as a run names them."""
    found: dict[str, dict[str, Any]] = {}

    def make(layout: Layout) -> dict[str, Any]:
        if layout.name not in found:
            root = tmp_path_factory.mktemp("published")
            folder = write_layout(layout, root / "base", TEXTS)
            found[layout.name] = dict(model=str(folder))
            if layout.processor is None:
                # What the public Mirage code saves has none: its base gives it.
                base = write_layout(LAYOUTS[0], root / "processor", TEXTS, weights=False)
                found[layout.name] = dict(model=str(base), load_model_path=folder)
        return found[layout.name]

    yield make


def weights_of(folders: dict[str, Any]) -> Path:
    return Path(folders.get("load_model_path") or folders["model"])


def plain_loss(folders: dict[str, Any], records: Path) -> float:
    """The mean of the rows' losses, by the tokenizer, image processor and model of plain transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(weights_of(folders))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = json.loads((weights_of(folders) / "chat_template.json").read_text())["chat_template"]
    processor = Qwen2VLImageProcessorPil.from_pretrained(folders["model"])
    model = AutoModelForImageTextToText.from_pretrained(weights_of(folders), dtype=torch.float32).eval()
    found = []
    for line in records.read_text().splitlines():
        row = json.loads(line)
        image = processor(Image.open(records.parent / row["image_input"]), return_tensors="pt")
        question = row["text_input"].removeprefix("<image>")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        head = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        tokens = int(image["image_grid_thw"].prod()) // 4
        head = head.replace("<|image_pad|>", tokens * "<|image_pad|>") + "<|im_start|>assistant"
        before, after = tokenizer(head)["input_ids"], row["text_output"].replace("<output_image>", "")
        answer = tokenizer(f"\n{after}<|im_end|>\n")["input_ids"]
        ids, labels = torch.tensor([[*before, *answer]]), torch.tensor([[-100] * len(before) + answer])
        kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        with torch.no_grad():
            found.append(model(input_ids=ids, labels=labels, mm_token_type_ids=kinds, **image).loss)
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("layout", chosen())
def test_every_stage_trains_and_opens(layout: Layout, group: Group, records: Path, made: Any, tmp_path: Path) -> None:
    base = made(layout)
    shared = SETTINGS | dict(data_path=records, eval_data_path=records, cache_dir=tmp_path / "cache")
    out = {stage: tmp_path / stage for stage in ("sft", "stage1", "stage2", "lora")}
    runs = [
        shared | base | dict(stage="sft", save_model_path=out["sft"]),
        shared | base | dict(stage="stage1", save_model_path=out["stage1"], load_model_path=out["sft"]),
        shared | base | dict(stage="stage2", save_model_path=out["stage2"], load_model_path=out["stage1"], save_every=1),
        shared | base | dict(stage="stage2", save_model_path=out["lora"], lora_rank=2),
    ]
    group.run(_train, runs, timeout_s=200)
    for folder in out.values():
        first, second = losses(folder)
        assert second < first, folder.name
        evaluated = [line for line in lines_of(folder) if "eval_loss" in line]
        assert len(evaluated) == 3, folder.name
        assert all("exact" in line or "eval_exact" in str(line) or line for line in evaluated)
        _, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(told.values()), folder.name
    assert losses(out["sft"])[0] == pytest.approx(plain_loss(base, records), abs=2e-5)
