"""Samples that lmms-eval 0.7.3 and VLMEvalKit (ms-vlmeval 0.0.20) wrote about eight maps: four rows of each run."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import REPO

from mirage_ds.analysis.controls.report import compare, compared
from mirage_ds.errors import UserError
from mirage_ds.evaluate.harness import read_harness

WRITTEN = REPO / "tests/fixtures/harness"
LOGS = [WRITTEN / f"{name}_samples_maps.jsonl" for name in ("own", "zero")]
TABLES = [WRITTEN / f"{name}_result.tsv" for name in ("own", "zero")]
Rows = list[dict[str, Any]]


def changed(change: Callable[[Rows], object], source: Path, target: Path) -> Path:
    """Write a file of a harness with some of it changed."""
    if source.suffix == ".jsonl":
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        change(rows)
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with source.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        change(rows)
        with target.open("w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL)
            out.writeheader()
            out.writerows(rows)
    return target


def test_runs_of_lmms_eval_are_paired_sample_by_sample(tmp_path: Path) -> None:
    # Two ranks log one after the other.
    turned = changed(list.reverse, LOGS[1], tmp_path / LOGS[1].name)
    report = compare([LOGS[0], turned], None, seed=1)
    # Right are answers with an f: fg�, ''gling, 'f, fff against f, ' Cf, ', fff.
    assert (report["task"], report["metric"], report["records"]) == ("maps", "accuracy", 4)
    assert [one["mean"] for one in report["files"].values()] == [0.75, 0.75]
    difference = report["files"][str(turned)]["difference"]
    assert (difference["mean"], difference["p"], difference["low"] < 0 < difference["high"]) == (0, 1, True)
    assert "no difference of accuracy is found" in compared(report).notes[0]
    # Latents that an API counted; a score that lies among other things.
    assert [one["metrics"]["latents"] for one in read_harness(LOGS[0])["answers"]] == [12, 12, 13, 12]
    assert compare([LOGS[0], turned], "maps_acc", 1)["files"] == report["files"]


def test_tables_of_vlmevalkit_are_paired_too(tmp_path: Path) -> None:
    def right(rows: Rows) -> None:
        for row in rows[:3]:
            row["hit"] = "1"

    better = changed(right, TABLES[1], tmp_path / "better.tsv")
    report = compare([TABLES[0], better], None, seed=1)
    assert (report["metric"], report["records"]) == ("hit", 4)
    assert report["files"][str(better)]["difference"]["mean"] == 0.75
    assert report["files"][str(better)]["difference"]["p"] == 0.25


# What the tasks log for a metric, beside the number.
OTHERS = {"question_id": 7, "category": "a", "index": 3}


@pytest.mark.parametrize(
    ("logged", "found"),
    [
        ({"vstar_a_acc": {**OTHERS, "score": 1.0}, "vstar_overall_acc": {**OTHERS, "score": 1.0}}, [1, 1]),
        ({"single": {**OTHERS, "gpt_score": 1}, "average": {**OTHERS, "gpt_score": 1}}, [1, 1]),
        ({"blink_acc": {"id": "x", "pred_parsed": "A", "is_correct": True}}, [1]),
        ({"mmvp_accuracy": {"pair_index": 4, "is_correct": False}}, [0]),
        ({"math": {"l2_category": "geometry", "score": 0.0}, "average": {"score": 0.0}}, [0, 0]),
        ({"llm_as_judge_eval": {"precision": 2.0, "true_false": True}, "submission": {"true_false": True}}, [1, 1]),
        ({"exact_match": 1.0}, [1]),
    ],
    ids=["vstar", "hrbench", "blink, cv_bench", "mmvp", "mmstar", "mathvista", "sat"],
)
def test_the_score_of_each_task(logged: dict[str, Any], found: list[float], tmp_path: Path) -> None:
    def change(rows: Rows) -> None:
        for row in rows:
            del row["accuracy"], row["maps_acc"]
            row.update(logged, token_counts=[{"output_tokens": 3}])

    read = read_harness(changed(change, LOGS[0], tmp_path / "a_samples_b.jsonl"))
    assert read["task"] == "b"
    assert all(one["metrics"] == dict(zip(logged, found, strict=True)) for one in read["answers"])


def failed(rows: Rows) -> None:
    rows[1]["filtered_resps"] = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error."


@pytest.mark.parametrize(
    ("change", "source", "says"),
    [
        (failed, LOGS[0], "1 of 4 requests failed, and are scored as wrong; run them again"),
        (lambda rows: rows[0].update(prediction="Failed to obtain answer via API. "), TABLES[0], "1 of 4 requests"),
        (lambda rows: rows.append(rows[2]), LOGS[0], "sample 2 is there 2 times"),
        (lambda rows: [(row.pop("accuracy"), row.pop("maps_acc")) for row in rows], LOGS[0], "no score of each sample"),
        (lambda rows: [row.pop("hit") for row in rows], TABLES[0], "no score of each sample (hit, score"),
        (lambda rows: rows[0].pop("doc_id"), LOGS[0], "is no per-sample log of lmms-eval; `lmms-eval --log_samples"),
        (lambda rows: [row.pop("prediction") for row in rows], TABLES[0], "its run with PRED_FORMAT=tsv and --judge"),
        (lambda rows: rows[0].update(hit="yes"), TABLES[0], "is no result table of VLMEvalKit"),
    ],
)
def test_a_file_that_cannot_be_paired_is_refused(
    change: Callable[[Rows], object], source: Path, says: str, tmp_path: Path
) -> None:
    file = changed(change, source, tmp_path / source.name)
    with pytest.raises(UserError, match=re.escape(f"{file}: ") + ".*" + re.escape(says)):
        read_harness(file)


@pytest.mark.parametrize(
    ("change", "source", "says"),
    [
        (lambda rows: rows[3].update(input="Another prompt"), LOGS[0], "the question on line 3 is not the same"),
        (lambda rows: rows[3].update(B="moved"), TABLES[0], "the question on line 3 is not the same"),
        (list.pop, LOGS[0], "of different numbers of answers (4, 3); evaluate both with the same --most or --limit"),
    ],
)
def test_runs_of_other_samples_are_refused(
    change: Callable[[Rows], object], source: Path, says: str, tmp_path: Path
) -> None:
    file = changed(change, source, tmp_path / source.name)
    with pytest.raises(UserError, match=re.escape(says)):
        compare([source, file], None, 1)
    with pytest.raises(UserError, match="of different tasks"):
        compare([LOGS[0], TABLES[0]], None, 1)
    with pytest.raises(UserError, match="cannot be read"):
        read_harness(tmp_path / "none.tsv")
