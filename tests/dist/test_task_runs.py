"""Every task from its records through sft, stage1 and stage2 on two ranks to its scores."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.group import Group

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.data.images import ImageFinder
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import load_decoder
from mirage_ds.evaluate.report import evaluate_file
from mirage_ds.evaluate.spec import EvaluateSpec
from mirage_ds.run.settings import Run
from mirage_ds.tasks import TASKS, get_task
from mirage_ds.tasks.build import build, convert

FIRST = {
    "vsp-spatial-planning": "success",
    "vsp-spatial-reasoning": "correct",
    "blink-jigsaw": "correct",
    "sat": "correct",
    "comt": "correct",
}
# Tasks without helper images, which stage1 has no targets for, and the one for the user's own records.
READING = ("vsp-transcription", "vsp-path-reading", "boxed")
# What their converters write is checked as training checks it in tests/unit/tasks/test_task_published.py.
CONVERTED = ("monet-sft", "lvr", "zebra-cot")
SETTINGS: dict[str, Any] = dict(
    latent_size=2, global_batch_size=10, micro_batch_tokens=8192, max_steps=2, warmup_steps=0, learning_rate=1e-3,
    num_workers=0, report_to=["none"], gradient_checkpointing=False,
)  # fmt: skip
LONG_S = 200


def _train(world: Any, settings: dict[str, Any]) -> str:
    """Train; what the user is told."""
    config = RunConfig(**settings)
    try:
        run = Run(config, world)
        data, learner = train.open_run(run)
        train.train(run, data, learner)
        learner.engine.destroy()
    except UserError as error:
        return str(error)
    return ""


def _image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 60, 3), np.uint8))


def _bytes(seed: int) -> bytes:
    content = io.BytesIO()
    _image(seed).save(content, "PNG")
    return content.getvalue()


def _sources(folder: Path) -> dict[str, Any]:
    """Write what the three tasks with pictures are made of: photographs, SAT with helpers, COMT."""
    for name in ("photos", "helpers", "comt/images/creation"):
        (folder / name).mkdir(parents=True)
    for n in range(12):
        (folder / f"photos/{n}.png").write_bytes(_bytes(n))
        (folder / f"helpers/{n}.png").write_bytes(_bytes(50 + n))
        (folder / f"comt/images/creation/p{n}.png").write_bytes(_bytes(100 + n))
    sides = [
        {
            "image_bytes": [_bytes(200 + n), _bytes(300 + n)],
            "question": "How did it move?",
            "answers": ["left", "right"],
            "question_type": "obj_movement",
            "correct_answer": "left",
        }
        for n in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(sides), folder / "SAT_val.parquet")
    angles = [
        {
            "id": str(n),
            "question": "Which angle?",
            "option": ["30", "60"],
            "image": [f"[IMAGE{i}:p{3 * n + i}]" for i in range(3)],
            "rationale": "Draw [IMAGE1], then [IMAGE2].",
            "answer": "B",
            "type": "creation",
        }
        for n in range(2)
    ]
    (folder / "comt/data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in angles))
    boards = {"prompt": "short", "cell_size": 28, "count": 2, "levels": [3], "proportions": [1.0]}
    return {
        "vsp-spatial-planning": (None, boards),
        "vsp-spatial-reasoning": (None, boards),
        "blink-jigsaw": (None, {"photos": folder / "photos", "count": 2, "side": 60, "min_side": 56}),
        "sat": (folder / "SAT_val.parquet", {"helpers": folder / "helpers"}),
        "comt": (folder / "comt", {}),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two records of each task, with helpers; their paths made absolute, so that all can stand in one file."""
    folder = tmp_path_factory.mktemp("tasks")
    found = {}
    for name, (source, values) in _sources(folder).items():
        out = folder / f"{name}_records"
        task = get_task(name)
        if source is None:
            report = build(name, task.build_settings(out=out, **values))
        else:
            report = convert(name, source, task.convert_settings(out=out, **values))
        assert report.records == 2
        found[name] = out / "absolute.jsonl"
        rows = [json.loads(line) for line in report.file.read_text().splitlines()]
        for row in rows:
            for key in ("image_input", "image_output"):
                row[key] = [str(out / path) for path in (row[key] if isinstance(row[key], list) else [row[key]])]
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def test_records_of_every_task_train_in_every_stage_and_are_scored(
    group: Group, nano: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    assert list(files) == [name for name in TASKS if name not in {*READING, *CONVERTED}]
    together = tmp_path / "together.jsonl"
    together.write_text("".join(file.read_text() for file in files.values()))
    base = SETTINGS | dict(data_path=together, cache_dir=tmp_path / "cache", feature_dir=tmp_path / "features")
    model = nano
    for stage in ("sft", "stage1", "stage2"):
        out = tmp_path / stage
        settings = base | dict(model=str(model), stage=stage, save_model_path=out)
        assert group.run(_train, settings, timeout_s=LONG_S) == ["", ""]
        log = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
        steps = [line for line in log if "loss" in line]
        assert [line["step"] for line in steps] == [1, 2]
        # Ten rows, the whole file, are one step: of the same rows a second one has the smaller loss.
        assert steps[1]["loss"] < steps[0]["loss"]
        model = out
    decoder = load_decoder(model, ImageFinder((Path("/"),)))
    for name, file in files.items():
        report = evaluate_file(
            decoder, EvaluateSpec(data_path=file, max_new_tokens=6, run_length="2", seed=1, batch_size=2)
        )
        scores = report["all"]
        assert report["task"] == name
        assert next(iter(scores)) == FIRST[name]
        assert scores["count"] == 2
        assert {"invalid", "low", "high"} <= scores.keys()
