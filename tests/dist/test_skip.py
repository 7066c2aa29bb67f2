"""--skip_bad_records on two ranks: the run is the one of a file without the faulty lines, and every rank agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.group import Group
from support.on_disk import TIMES

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.run.settings import Run

HOW = (
    "or name its column by --columns helper=…, or train this row in sft, or in stage2 with <output_image> in the answer"
)
SETTINGS: dict[str, Any] = dict(
    stage="stage1", latent_size=2, global_batch_size=2, micro_batch_size=1, max_steps=3, warmup_steps=0,
    learning_rate=3e-3, num_workers=0, report_to=["none"], gradient_checkpointing=False,
)  # fmt: skip


def _train(world: Any, settings: dict[str, Any]) -> str | None:
    """Train; what the user is told."""
    try:
        config = RunConfig(**settings)
        run = Run(config, world)
        data, learner = train.open_run(run)
        train.train(run, data, learner)
        learner.engine.destroy()
    except UserError as error:
        return str(error)
    return None


class Trainer:
    def __init__(self, group: Group, base: dict[str, Any], folder: Path):
        self.group, self.base, self.folder = group, base, folder

    def said(self, out: Path, **settings: Any) -> str | None:
        """Train into `out`; what both ranks tell the user."""
        told = self.group.run(_train, self.base | dict(save_model_path=out, log_file=out / "said.txt") | settings)
        assert told[0] == told[1]
        return told[0]

    def log(self, name: str, **settings: Any) -> list[dict[str, float]]:
        assert self.said(self.folder / name, **settings) is None
        lines = [json.loads(line) for line in (self.folder / name / "run/log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def spoil(image: Path) -> None:
    """Keep the header, lose the picture."""
    image.write_bytes(image.read_bytes()[:300])


@pytest.fixture
def data(mixed: Path, tmp_path: Path) -> Path:
    """Twelve records of which stage1 can use six; line 5's helper lacks its picture, line 10's is a copy of it.

    Two more lines are no records. clean.jsonl beside it holds the four that are left.
    """
    shutil.copytree(mixed.parent, tmp_path / "data")
    path = tmp_path / "data/mixed.jsonl"
    lines = path.read_text().splitlines()
    good = [line for number, line in enumerate(lines) if "image_output" in json.loads(line) and number not in (4, 9)]
    path.write_text("\n".join([*lines, '{"text_input": ', '{"text_input": "q", "text_output": "a", "n": NaN}']) + "\n")
    (tmp_path / "data/clean.jsonl").write_text("\n".join(good) + "\n")
    assert len(good) == 4
    spoil(tmp_path / "data/out4.png")
    shutil.copy(tmp_path / "data/out4.png", tmp_path / "data/out9.png")
    return path


@pytest.fixture
def trainer(group: Group, nano: Path, data: Path, tmp_path: Path) -> Trainer:
    base = SETTINGS | dict(model=str(nano), data_path=data, cache_dir=tmp_path / "cache")
    return Trainer(group, base, tmp_path)


SKIP: dict[str, Any] = dict(skip_bad_records=True, max_bad_share=0.75)
# Lines from 1; the helpers that are missing, the broken ones, the lines that are no records.
FAULTY = [3, 4, 5, 7, 8, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("cache", ["all", "off"])
def test_the_run_is_that_of_a_file_without_the_faulty_lines(trainer: Trainer, data: Path, cache: str) -> None:
    skipping = trainer.log("skipping", feature_cache=cache, **SKIP)
    clean = trainer.log("clean", feature_cache=cache, data_path=data.parent / "clean.jsonl")
    assert len(skipping) == 3
    assert len({line["loss"] for line in skipping}) == 3
    assert skipping == clean
    weights = [(trainer.folder / name / "model.safetensors").read_bytes() for name in ("skipping", "clean")]
    assert weights[0] == weights[1]

    listed = [json.loads(line) for line in (trainer.folder / "skipping/run/skipped.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == FAULTY
    assert {row["file"] for row in listed} == {str(data)}
    found = {row["line"]: (row["field"], row["what"], row["how"]) for row in listed}
    assert found[3] == (
        "image_output", "stage1 needs a helper image", f"add its path, {HOW}"
    )  # fmt: skip
    assert found[5][1].startswith(f"image {data.parent / 'out4.png'} cannot be decoded (")
    assert found[10][0] == "image_output"
    assert "cannot be decoded (" in found[10][1]
    assert found[13][1].startswith("not valid JSON")
    assert found[14][1] == "NaN is no JSON number"

    said = (trainer.folder / "skipping/said.txt").read_text()
    assert said.count("10 faulty record(s) skipped, listed in ") == 1
    # What has not happened has no line.
    assert "dropped as longer" not in said
    assert "skipped" not in (trainer.folder / "clean/said.txt").read_text()
    assert not (trainer.folder / "clean/run/skipped.jsonl").exists()


@pytest.mark.parametrize(
    ("share", "count"),
    [(0.55, 8), (0.7, 10)],
    ids=["at once", "when the pictures are decoded"],
)
def test_above_the_share_every_rank_refuses_with_the_first_fault(
    trainer: Trainer, data: Path, share: float, count: int
) -> None:
    out = trainer.folder / "refused"
    said = trainer.said(out, skip_bad_records=True, max_bad_share=share)
    assert said == (
        f"{data}: {count} of 14 records have a fault, above --max_bad_share {share}; the first is line 3, "
        "image_output: stage1 needs a helper image; "
        f"add its path, {HOW} "
        f"(`mirage-ds data check {data}` lists them)"
    )
    assert not out.exists()


def test_without_the_flag_one_fault_refuses(trainer: Trainer, data: Path) -> None:
    assert trainer.said(trainer.folder / "refused", max_bad_share=1).startswith(
        f"{data}: image_output: stage1 needs a helper"
    )


def test_a_resumed_run_finds_the_same_rows_or_says_that_they_are_others(trainer: Trainer, data: Path) -> None:
    out = trainer.folder / "out"
    assert trainer.said(out, max_steps=1, save_every=1, **SKIP) is None
    # More steps reach more rows; the rows that are skipped stay the same.
    assert trainer.said(out, max_steps=3, save_every=1, resume="auto", **SKIP) is None
    whole = trainer.log("whole", **SKIP)
    assert [json.loads(line)["step"] for line in (out / "run/log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert [line["rows"] for line in whole] == [2, 2, 2]
    # As many rows as before, but others: one is mended, another broken.
    shutil.copy(data.parent / "out0.png", data.parent / "out4.png")
    spoil(data.parent / "out5.png")
    said = trainer.said(out, max_steps=4, resume="auto", **SKIP)
    assert said.startswith("--resume auto: ")
    assert "number of usable rows" in said


def test_faulty_evaluation_records_are_skipped_and_listed_too(trainer: Trainer, data: Path) -> None:
    # Its images lie beside it and nowhere else.
    folder = trainer.folder / "evaluation"
    folder.mkdir()
    good = [json.loads(line) for line in (data.parent / "clean.jsonl").read_text().splitlines()]
    for row in good:
        for key in ("image_input", "image_output"):
            if key in row:
                shutil.copy(data.parent / row[key], folder / f"own_{row[key]}")
                row[key] = f"own_{row[key]}"
    lines = "".join(json.dumps(row) + "\n" for row in good)
    (folder / "clean.jsonl").write_text(lines)
    (folder / "broken.jsonl").write_text(lines + "{\n")
    settings = dict(data_path=data.parent / "clean.jsonl", eval_every=3, confine_paths=True)
    skipping = trainer.log(
        "skipping", eval_data_path=folder / "broken.jsonl", skip_bad_records=True, max_bad_share=0.2, **settings
    )
    clean = trainer.log("clean", eval_data_path=folder / "clean.jsonl", **settings)
    assert "eval_loss" in skipping[-1]
    assert skipping == clean
    (listed,) = (trainer.folder / "skipping/run/skipped.jsonl").read_text().splitlines()
    assert (json.loads(listed)["file"], json.loads(listed)["line"]) == (str(folder / "broken.jsonl"), 5)
