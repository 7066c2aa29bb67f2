"""From the folders of a study to its Results. Imports no torch."""

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from mirage_ds.cluster.status.facts import json_lines, split_log
from mirage_ds.data.record import parse_object
from mirage_ds.data.record_files import places
from mirage_ds.engine.versions import versions
from mirage_ds.plan.formulas import flops
from mirage_ds.plan.shape import read_shape, sizes
from mirage_ds.study.nodes import CellPlan, Node, Study
from mirage_ds.study.results import Cell, Results, Scores, StageResult, parted
from mirage_ds.study.store import Store

# Points of a learning curve: more cannot be seen.
POINTS = 300


def curve_of(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Thin a log out to a learning curve: of neighbouring steps the mean loss, at the last one's number."""
    log = pd.DataFrame(steps, columns=["step", "loss"], dtype=float)
    parts = log.groupby(log.index // max(1, -(-len(log) // POINTS)))
    return parts.agg({"step": "last", "loss": "mean"}).dropna().to_dict("records")


def stage_result(node: Node, store: Store) -> StageResult:
    """Read what a training stage came to."""
    model, config = store.model(node), node.config
    steps, _ = split_log(json_lines(model / "run" / "log.jsonl"))
    shape = sizes(read_shape(str(model / "config.json")))
    rows, tokens = sum(line["rows"] for line in steps), sum(line["tokens"] for line in steps)
    labelled = sum(line.get("labels", 0) for line in steps)
    seconds = sum(line["seconds"] for line in steps)
    memory = [line["memory_gb"] for line in steps if line.get("memory_gb") is not None]
    return StageResult(
        name=node.name,
        key=store.place(node).name,
        stage=config.stage,
        steps=len(steps),
        rows=rows,
        tokens=tokens,
        # A token attends to half a row on the average.
        flops=flops(shape, tokens, labelled, tokens / max(1, rows) / 2, config.gradient_checkpointing),
        seconds=seconds,
        samples_s=rows / seconds if seconds else 0.0,
        peak_gb=max(memory, default=None),
        curve=curve_of(steps),
    )


@lru_cache
def levels_of(file: Path) -> dict[int, str]:
    """Return the level of each line of a records file: what it calls its level, else the side of its map, else "?"."""
    found = {}
    for number, _, line, raw in places(file):
        row = parse_object(raw, line) if isinstance(raw, str) else raw
        board = row.get("map_desc")
        found[number] = str(row.get("level", len(board) if isinstance(board, list) else "?"))
    return found


def _result(node: Node, store: Store) -> Any:
    """Read what `mirage-ds controls` or `mirage-ds evaluate` wrote; of the latter, its Scores."""
    found = json.loads(store.result(node).read_text(encoding="utf-8"))
    if node.kind == "controls":
        return found
    assert node.evaluation is not None
    answers, levels = found["answers"], levels_of(node.evaluation.data_path)
    names = dict.fromkeys(name for one in answers for name in one["metrics"])
    return Scores(
        records=[str(one["line"]) for one in answers],
        levels=[levels[one["line"]] for one in answers],
        metrics={name: [float(one["metrics"].get(name, math.nan)) for one in answers] for name in names},
        said=_said(answers),
    )


def _said(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keep two answers for the report: the first of those with the highest score, and of those with the lowest."""
    scored = [(float(next(iter(one["metrics"].values()))), one) for one in answers if one["metrics"]]
    pair = [pick(scored, key=lambda one: one[0]) for pick in (max, min)] if scored else []
    return {
        str(one["line"]): {"answer": one["text"], "latents": int(one["metrics"].get("latents", 0)), "score": score}
        for score, one in pair
    }


def _problem(node: Node, store: Store) -> str:
    """Say why a cell has no scores: a node of it that is not done."""
    attempts = store.attempts(node)
    if attempts:
        return f"{node.folder} failed {len(attempts)} time(s), at last with {attempts[-1]['why']}"
    return f"{node.folder} has not been run"


def _cell(plan: CellPlan, study: Study, store: Store, settings: Mapping[str, Any]) -> Cell:
    nodes = {key: study.nodes[key] for key in plan.nodes}
    done = {key: node for key, node in nodes.items() if store.is_done(node)}
    undone = [node for key, node in nodes.items() if key not in done]
    scores, controls = parted({title: _result(done[key], store) for title, key in plan.results.items() if key in done})
    return Cell(
        arm=plan.arm,
        seed=plan.seed,
        settings=settings,
        stages=[stage_result(done[key], store) for key in plan.stages if key in done],
        scores=scores,
        controls=controls,
        problem=_problem(undone[0], store) if undone else None,
        chain=plan.stages[-1],
        keys=plan.results,
    )


def stated(study: Study) -> list[dict[str, Any]]:
    """Return each cell's settings, with what other arms of the same stages vary and it leaves at its default.

    So the arm that all others of a sweep are measured against has a place on their axis.
    """
    chains = [tuple(study.nodes[key].name for key in cell.stages) for cell in study.cells]
    varied: dict[tuple[str, ...], dict[str, None]] = {}
    for cell, names in zip(study.cells, chains, strict=True):
        varied.setdefault(names, {}).update(dict.fromkeys(cell.settings))
    found = []
    for cell, names in zip(study.cells, chains, strict=True):
        nodes = [study.nodes[key] for key in cell.stages]
        own = {key: _default(key, nodes) for key in varied[names] if key not in cell.settings}
        found.append({**cell.settings, **{key: value for key, value in own.items() if value is not None}})
    return found


def _default(key: str, nodes: Sequence[Node]) -> str | float | None:
    """Return a setting of a chain as its runs have it: of the stage before the dot, or of the last one."""
    stage, _, name = key.rpartition(".")
    config = next((node.config for node in reversed(nodes) if node.name == stage or not stage), None)
    value = getattr(config, name, None)
    return value if isinstance(value, (str, int, float)) else None


def collect(study: Study, store: Store) -> Results:
    """Read everything that is there of a study."""
    settings = stated(study)
    cells = [_cell(plan, study, store, own) for plan, own in zip(study.cells, settings, strict=True)]
    found = versions()
    return Results(
        name=study.spec.name,
        question=study.spec.question,
        arms={cell.arm: study.spec.arms[cell.arm.partition("[")[0]].about for cell in cells},
        cells=cells,
        report=study.spec.report,
        made={
            "date": time.strftime("%Y-%m-%d"),
            "commit": str(found.get("git_commit")),
            "machine": f"{platform.machine()}, {platform.system()}",
            **{name: str(found[name]) for name in ("torch", "transformers", "deepspeed")},
        },
    )
