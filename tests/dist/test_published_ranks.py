"""Folders in published layouts (tests/support/published.py) through everything that a user does with one.

All layouts, and the really published files where they are at hand. What one process does with them stands in
tests/unit/model/test_published.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.group import Group
from support.on_disk import lines_of
from support.published import LAYOUTS, Layout, new_forms, write_layout
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import mirage_ds
from mirage_ds import train
from mirage_ds.cli import main
from mirage_ds.config.run import RunConfig
from mirage_ds.data.images import ImageFinder
from mirage_ds.engine.save import export_folder
from mirage_ds.engine.universal import convert
from mirage_ds.evaluate.decoder import load_decoder
from mirage_ds.evaluate.report import evaluate_file
from mirage_ds.evaluate.spec import EvaluateSpec
from mirage_ds.plan.shape import read_shape, sizes
from mirage_ds.run.settings import Run

# One of each family, whose first loss is plain transformers'.
COMPARED = ("qwen2.5-vl-7b", "qwen2-vl-7b", "qwen3-vl-8b")
# On one rank what two have begun: one of each family.
RESUMED = ("mirage", "qwen2-vl-4.46", "qwen3-vl-4b")
K, ROWS = 2, 4
STAGES = ("sft", "stage1", "stage2")
TEXTS = ("Where does the way go? Left, left, then right. \\boxed{A}", "system\nYou are a helpful assistant.\nuser\n")
SETTINGS: dict[str, Any] = dict(
    latent_size=K, global_batch_size=ROWS, micro_batch_tokens=4096, max_steps=2, warmup_steps=0, learning_rate=1e-3,
    num_workers=0, report_to=["none"], eval_every=2, eval_decode=2, eval_new_tokens=2, task="boxed",
)  # fmt: skip


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


def _train(world: Any, runs: list[dict[str, Any]]) -> None:
    """Train one run after the other."""
    for settings in runs:
        config = RunConfig(**settings)
        run = Run(config, world)
        data, learner = train.open_run(run)
        train.train(run, data, learner)
        learner.engine.destroy()


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines_of(out) if "loss" in line]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
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

    return make


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


def runs_of(layout: Layout, shared: dict[str, Any], root: Path) -> list[dict[str, Any]]:
    """The runs of a layout: all stages one after the other, one of them with adapters, or the last alone."""
    stages = STAGES[2:] if layout.name.startswith("real") else STAGES
    found: list[dict[str, Any]] = []
    for stage in stages:
        before = dict(load_model_path=found[-1]["save_model_path"]) if found else {}
        found.append(shared | before | dict(stage=stage, save_model_path=root / stage, save_every=1))
    if len(stages) == 3:
        # The first run's losses are compared with plain transformers': its adapters do nothing yet.
        found[LAYOUTS.index(layout) % 3] |= dict(lora_rank=2, learning_rate=1e-2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(one, id=one.name) for one in (*LAYOUTS, *new_forms())])
def test_a_published_folder_in_use(
    layout: Layout, group: Group, one_rank: Group, records: Path, made: Any, tmp_path: Path
) -> None:
    base = made(layout)
    shared = SETTINGS | base | dict(data_path=records, eval_data_path=records, cache_dir=tmp_path / "cache")
    runs = runs_of(layout, shared, tmp_path)
    group.run(_train, runs, timeout_s=500)
    for run in runs:
        first, second = losses(run["save_model_path"])
        assert second < first
        (evaluated,) = [line for line in lines_of(run["save_model_path"]) if "eval_loss" in line]
        assert any("count" in key and value == 2 for key, value in evaluated.items()), evaluated
        _, told = AutoModelForImageTextToText.from_pretrained(run["save_model_path"], output_loading_info=True)
        assert not any(told.values())
    if runs[0]["stage"] == "sft" and layout.name in COMPARED:
        assert losses(runs[0]["save_model_path"])[0] == pytest.approx(plain_loss(base, records), abs=2e-5)
    if len(runs) == len(STAGES):
        last = runs[-1]["save_model_path"]
        check_export(last, tmp_path / "exported")
        check_answers(last, records)
        if layout.name in RESUMED:
            check_resumed(runs[-1], one_rank)
    check_commands(layout, base, runs[-1]["save_model_path"], records, tmp_path)


def check_resumed(run: dict[str, Any], one_rank: Group) -> None:
    """The second step once more, on one rank: the same loss."""
    out: Path = run["save_model_path"]
    wanted, wanted_model = losses(out)[1], load_file(out / "model.safetensors")
    checkpoints = out / "run/checkpoints"
    shutil.rmtree(checkpoints / "global_step2")
    (checkpoints / "latest").write_text("global_step1")
    convert(checkpoints / "global_step1")
    log = out / "run/log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if json.loads(line)["step"] < 2))
    one_rank.run(_train, [run | dict(resume="auto")], timeout_s=500)
    assert losses(out)[1] == pytest.approx(wanted, abs=1e-5)
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted_model[name], rtol=0, atol=1e-3)


def check_export(out: Path, made: Path) -> None:
    """The checkpoint as a folder is what training saved, and opens with other rows."""
    export_folder(out / "run/checkpoints/global_step2", made, None, None)
    said, wanted = load_file(made / "model.safetensors"), load_file(out / "model.safetensors")
    assert said.keys() == wanted.keys()
    assert all(torch.equal(said[name], wanted[name]) for name in wanted)
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        assert (made / name).read_text() == (out / name).read_text()


def check_answers(out: Path, records: Path) -> None:
    """It is scored, and answers, with the k that it was trained with."""
    decoder = load_decoder(out, ImageFinder.beside(records, None))
    report = evaluate_file(decoder, EvaluateSpec(data_path=records, task="boxed", max_new_tokens=3, most=2))
    assert (report["settings"]["run_length"], report["all"]["count"]) == (K, 2)
    model = mirage_ds.load(out)
    assert model.latent_size == K
    assert model.generate("Where?", max_new_tokens=3).ids


def check_commands(layout: Layout, base: dict[str, Any], out: Path, records: Path, scratch: Path) -> None:
    """Doctor, plan and `ablate plan` take the folder, and what training made of it."""
    study = scratch / "study.yaml"
    common = {"model": base["model"], "data_path": str(records), "max_steps": 2}
    values = {"name": "s", "out": "runs", "common": common, "stages": {"sft": {"stage": "sft"}}, "seeds": [0]}
    values |= {
        "arms": {"text": {"chain": ["sft"]}},
        "evaluations": {"test": {"data_path": str(records), "task": "boxed"}},
    }
    study.write_text(yaml.safe_dump(values, sort_keys=False))
    for words in (
        ["plan", "--model", weights_of(base), "--stage", "stage2", "--json"],
        ["plan", "--model", out, "--stage", "stage2", "--json"],
        ["doctor", "--model", out, "--only", "model"],
        ["ablate", "plan", study],
    ):
        assert call(*words) == 0, words
    whole = AutoModelForImageTextToText.from_pretrained(out)
    found = sizes(read_shape(str(out / "config.json")))
    vision = sum(p.numel() for p in whole.model.visual.parameters())
    assert (found.text, found.vision) == (sum(p.numel() for p in whole.parameters()) - vision, vision)


def call(*words: Any) -> int:
    """Run `mirage-ds` in this process; its exit code."""
    before, sys.argv = sys.argv, ["mirage-ds", *map(str, words)]
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    finally:
        sys.argv = before
    return 0
