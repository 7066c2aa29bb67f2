"""What a report shows of its records: the chance level, two answers, and why one is not there."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.pictures import noise
from support.records import write_jsonl
from support.studies import Scored, columns, contrast, opened, write_study

from mirage_ds.data.record_files import read_records
from mirage_ds.rl.examples import FILE, SIDE
from mirage_ds.study.collect import _result, _said, best_constant, rollouts_of, with_records
from mirage_ds.study.report import figures
from mirage_ds.study.report.build import write_report
from mirage_ds.study.results import Cell, Results, StageResult
from mirage_ds.study.spec import EvaluationSpec, ReportSpec

ANSWERS = ("A", "B", "A", "C", "A", "B")


def records(folder: Path, **more: Any) -> Path:
    noise((2 * SIDE, SIDE), 40).save(folder / "in.png")
    rows = [
        {"text_input": "<image>Which?", "text_output": f"<output_image>So \\boxed{{{one}}}", "image_input": "in.png"}
        for one in ANSWERS
    ]
    return write_jsonl(
        folder / "rows.jsonl", [{**row, "image_output": "in.png", "task": "boxed", **more} for row in rows]
    )


def results(file: Path) -> tuple[Results, dict[str, EvaluationSpec]]:
    said = {"2": {"answer": "So B", "latents": 4, "score": 1.0}, "3": {"answer": "C", "latents": 0, "score": 0.0}}
    scores = columns([Scored(str(at), "?", {"correct": 1.0}) for at in range(1, 7)])
    cells = [Cell("base", 0, scores={"test": replace(scores, said={"1": said["2"]})}),
             Cell("own", 0, scores={"test": replace(scores, said=said)})]  # fmt: skip
    asked = ReportSpec(primary=contrast("own", "base", "test"))
    return Results("s", "?", {"base": "", "own": ""}, cells, asked), {
        "test": EvaluationSpec.model_validate({"data_path": file}, context=file.parent)
    }


def test_the_best_constant_answer_is_the_commonest_right_one(tmp_path: Path) -> None:
    found = best_constant(read_records(records(tmp_path)), "boxed")
    assert found == [float(one == "A") for one in ANSWERS]
    assert best_constant([replace(one, text_output="") for one in read_records(records(tmp_path))], "boxed") == []


def test_chance_and_two_answers_of_the_primary_arm(tmp_path: Path) -> None:
    found = with_records(*results(records(tmp_path)))
    assert found.unseen == []
    assert found.chance["test"] == {str(at): float(one == "A") for at, one in enumerate(ANSWERS, 1)}
    first, second = found.examples
    picture = Image.open(io.BytesIO(first["picture"]))
    assert picture.size == (SIDE, SIDE // 2)
    assert {key: value for key, value in first.items() if key != "picture"} == {
        **{"arm": "own", "seed": 0, "evaluation": "test", "line": 2, "question": "Which?", "right": "So \\boxed{B}"},
        **{"answer": "So B", "latents": 4, "score": 1.0},
    }
    assert (second["line"], second["answer"]) == (3, "C")


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda folder: (folder / "in.png").unlink(), "in.png"),
        (lambda folder: records(folder, task="comtt"), "comtt"),
        (lambda folder: (folder / "rows.jsonl").unlink(), "no such file"),
    ],
)
def test_what_cannot_be_shown_is_a_hole(tmp_path: Path, break_it: Any, why: str) -> None:
    whole = results(records(tmp_path))
    break_it(tmp_path)
    found = with_records(*whole)
    # Answers are shown even where nobody knows what chance would get.
    assert bool(found.examples) == (why == "comtt")
    assert len(found.unseen) == 1
    assert why in found.unseen[0]


def test_of_all_answers_one_of_the_best_and_one_of_the_worst_are_kept() -> None:
    marks = (0.5, 0.0, 1.0, 1.0, 0.0)
    answers = [
        {"line": at, "text": f"a{at}", "metrics": {"correct": mark, "latents": 4}} for at, mark in enumerate(marks)
    ]
    assert json.loads(json.dumps(_said(answers))) == {
        "2": {"answer": "a2", "latents": 4, "score": 1.0},
        "1": {"answer": "a1", "latents": 4, "score": 0.0},
    }
    assert _said([]) == {}


def test_two_rollouts_of_each_arm_of_rl(tmp_path: Path) -> None:
    noise((2 * SIDE, SIDE), 40).save(tmp_path / "in.png")
    lines = [
        {"rollout": number, "file": str(tmp_path / "rows.jsonl"), "line": number, "question": "Which?",
         "image_input": ["in.png"] if number < 3 else [], "answer": f"*a*{at} [4 latents]", "reward": float(at),
         "rewards": {"accuracy": float(at)}, "advantage": at - 0.5}
        for number in (1, 2, 3) for at in (0, 1)
    ]  # fmt: skip
    write_jsonl(tmp_path / FILE, lines)
    own = rollouts_of(tmp_path, None)
    assert [one["rollout"] for one in own] == [1, 3]
    assert rollouts_of(tmp_path / "nowhere", None) == []
    whole, _ = results(records(tmp_path))
    stage = StageResult("rl", "key", "rl", 2, 2, 2, 2e9, 2.0, 1.0, 1.0, [{"step": 1, "reward": 0.5}], own)
    sft = StageResult("sft", "other", "sft", 2, 2, 2, 2e9, 2.0, 1.0, 1.0, [{"step": 1, "loss": 0.5}])
    base, mine = whole.cells
    cells = [replace(base, stages=[sft]), replace(mine, stages=[sft, stage]),
             replace(mine, seed=1, stages=[sft, stage])]  # fmt: skip
    written = write_report(replace(whole, cells=cells), tmp_path / "report", 50)
    assert [(one["arm"], one["seed"], one["rollout"]) for one in written["rollouts"]] == [("own", 0, 1), ("own", 0, 3)]
    assert "picture" not in json.dumps(written["rollouts"] + [one["cells"] for one in written["arms"]])
    assert Image.open(tmp_path / "report/figures/example-1.png").size == (SIDE, SIDE // 2)
    text = (tmp_path / "report/report.md").read_text()
    first, third = (text.index(f"### own, seed 0: rollout {number}") for number in (1, 3))
    shown = [text[first:third], text[third : text.index("## Cost")]]
    assert ["(figures/example-1.png)" in one for one in shown] == [True, False]
    assert all("\n\n    *a*1 [4 latents]\n\nReward 0 (accuracy 0), advantage -0.50:\n" in one for one in shown)
    page = (tmp_path / "report/report.html").read_text()
    assert "<code>*a*1 [4 latents]\n</code>" in page
    # A panel for the loss, one for the reward.
    (drawn,) = figures.curves(replace(whole, cells=cells), written)
    assert [axes.get_ylabel().split()[0] for axes in drawn.figure.axes] == ["training", "reward"]


def test_the_levels_of_scores_are_those_of_the_records(tmp_path: Path, nano: Path) -> None:
    rows = [{"text_input": "?", "text_output": "\\boxed{A}", "task": "boxed", **one} for one in ({"level": 3}, {})]
    write_jsonl(tmp_path / "data.jsonl", rows)
    study, store = opened(write_study(tmp_path, nano))
    node = next(node for node in study.nodes.values() if node.kind == "evaluate")
    answers = [{"line": line, "text": "A", "metrics": {"correct": 1.0}} for line in (2, 1)]
    store.place(node).mkdir(parents=True)
    store.result(node).write_text(json.dumps({"answers": answers}))
    found = _result(node, store)
    assert (found.records, found.levels, found.metrics) == (["2", "1"], ["?", "3"], {"correct": [1.0, 1.0]})
