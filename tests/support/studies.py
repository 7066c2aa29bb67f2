"""Small studies for the tests, and nodes that pretend to train."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mirage_ds.study.nodes import Node, Study, spell_out
from mirage_ds.study.results import Scores
from mirage_ds.study.spec import ContrastSpec, read_study
from mirage_ds.study.store import Store

STAGES = {
    "base": {"stage": "sft", "seed": 0},
    "sft": {"stage": "sft"},
    "stage1": {"stage": "stage1"},
    "stage2": {"stage": "stage2"},
}

# Waits for the file `go` if it is there to be waited for, then leaves what a node leaves.
PRETEND = """
import json, os, pathlib, signal, sys, time
place, kind, mode = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if mode != "deaf":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("working on", place.name, flush=True)
if mode == "fail":
    sys.exit("error: this one always fails")
if mode == "user":
    print("error: a user has to fix this"); sys.exit(2)
if mode == "once" and not (place / "tried").exists():
    (place / "tried").touch(); sys.exit(70)
if mode in ("long", "deaf", "some"):
    time.sleep(60 if mode != "some" else 3)
if kind == "train":
    (place / "model").mkdir(exist_ok=True); (place / "model" / "config.json").write_text("{}")
else:
    (place / "result.json").write_text(json.dumps({"answers": []}))
"""


def write_study(folder: Path, nano: Path, rows: int = 6, **changed: Any) -> Path:
    """Write a study beside records of its own."""
    data = folder / "data.jsonl"
    if not data.exists():
        lines = [
            {"text_input": f"Where {row}?", "text_output": "\\boxed{UP}", "level": 3, "task": "boxed"}
            for row in range(rows)
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "name": "small",
        "out": "runs",
        "common": {"model": str(nano), "data_path": "data.jsonl", "max_steps": 2},
        "stages": STAGES,
        "arms": {"text": {"chain": ["base", "sft"]}, "mirage": {"chain": ["base", "stage1", "stage2"]}},
        "seeds": [0, 1],
        "evaluations": {"test": {"data_path": "data.jsonl"}},
    } | changed
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def opened(file: Path) -> tuple[Study, Store]:
    spec = read_study(file)
    return spell_out(spec, file.resolve().parent), Store(spec.out, spec.launch.retries + 1)


def pretend(store: Store, modes: dict[str, str]):
    """Make a launch.command that starts a pretended node; modes: name of a node or its folder → how it behaves."""

    def command(node: Node, *_: Any) -> list[str]:
        mode = modes.get(node.folder, modes.get(node.name, "well"))
        return [sys.executable, "-c", PRETEND, str(store.place(node)), node.kind, mode]

    return command


class Scored(NamedTuple):
    """One record's score."""

    record: str
    level: str
    metrics: dict[str, float]


def columns(scored: Sequence[Scored]) -> Scores:
    """Put records' scores together."""
    names = dict.fromkeys(name for one in scored for name in one.metrics)
    metrics = {name: [one.metrics.get(name, math.nan) for one in scored] for name in names}
    return Scores([one.record for one in scored], [one.level for one in scored], metrics)


def rows(scores: Scores) -> list[Scored]:
    """Take records' scores apart."""
    return [
        Scored(record, level, {name: values[at] for name, values in scores.metrics.items()})
        for at, (record, level) in enumerate(zip(scores.records, scores.levels, strict=True))
    ]


def contrast(arm: str, base: str, evaluation: str, levels: tuple[str, ...] = (), metric: str | None = None):
    return ContrastSpec(arm=arm, base=base, evaluation=evaluation, levels=levels, metric=metric)
