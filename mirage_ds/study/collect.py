"""From the folders of a study to its Results. Imports no torch."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mirage_ds.engine.installed import versions
from mirage_ds.plan.formulas import flops
from mirage_ds.plan.shape import Sizes, read_shape, sizes
from mirage_ds.study.nodes import CellPlan, Node, Study
from mirage_ds.study.results import CONTROLS, SCORES, Cell, Contrast, Results, Scored, StageResult
from mirage_ds.study.spec import ContrastSpec
from mirage_ds.study.store import Store

# Points of a learning curve: more cannot be seen.
POINTS = 300


def log_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a run's log.jsonl."""
    file = run / "log.jsonl"
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                yield json.loads(line)


def curve_of(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Thin a log out to a learning curve: of neighbouring steps the mean, at the last one's number."""
    steps = [line for line in lines if "loss" in line]
    found: list[dict[str, float]] = []
    size = max(1, -(-len(steps) // POINTS))
    for at in range(0, len(steps), size):
        part = steps[at : at + size]
        means = {
            name: sum(values) / len(values)
            for name in ("loss", "ce", "sim")
            if (values := [float(one[name]) for one in part if one.get(name) is not None])
        }
        found.append({"step": float(part[-1]["step"]), **means})
    measured = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    by_step = {one["step"]: one for one in found}
    for step, loss in measured.items():
        by_step.setdefault(float(step), {"step": float(step)})["eval_loss"] = float(loss)
    return [by_step[step] for step in sorted(by_step)]


@lru_cache
def _sizes(file: Path) -> Sizes:
    return sizes(read_shape(str(file)))


def stage_result(node: Node, store: Store) -> StageResult:
    """Read what a training stage came to."""
    assert node.config is not None
    model, config = store.model(node), node.config
    lines = list(log_lines(model / "run"))
    steps = [line for line in lines if "loss" in line]
    shape = _sizes(model / "config.json")
    rows, tokens = sum(line["rows"] for line in steps), sum(line["tokens"] for line in steps)
    labelled = sum(line.get("labels", 0) for line in steps)
    # A token attends to half a row on the average.
    work = flops(shape, tokens, labelled, tokens / max(1, rows) / 2, config.gradient_checkpointing)
    seconds = sum(line["seconds"] for line in steps)
    memory = [line["memory_gb"] for line in steps if line.get("memory_gb") is not None]
    return StageResult(
        name=node.name,
        key=store.place(node).name,
        stage=config.stage,
        steps=len(steps),
        rows=rows,
        tokens=tokens,
        flops=work,
        seconds=seconds,
        samples_s=rows / seconds if seconds else 0.0,
        peak_gb=max(memory, default=None),
        curve=curve_of(lines),
    )


@lru_cache
def levels_of(file: Path) -> tuple[str, ...]:
    """Return the level of each line of a records file: what it calls its level, else the side of its map, else "?"."""
    found = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        row = json.loads(line) if line.strip() else {}
        board = row.get("map_desc")
        found.append(str(row.get("level", len(board) if isinstance(board, list) else "?")))
    return tuple(found)


def scored(result: Path, data: Path) -> list[Scored]:
    """Read the answers' scores out of what `mirage-ds evaluate --out` wrote."""
    levels = levels_of(data)
    return [
        Scored(
            record=str(one["line"]),
            level=levels[one["line"] - 1],
            metrics={name: float(value) for name, value in one["metrics"].items()},
        )
        for one in json.loads(result.read_text(encoding="utf-8"))["answers"]
    ]


def _problem(plan: CellPlan, study: Study, store: Store) -> str | None:
    """Say why a cell has no scores: the first node of it that is not done."""
    for key in plan.nodes:
        node = study.nodes[key]
        if store.done(node) is None:
            attempts = store.attempts(node)
            if attempts:
                return f"{node.folder} failed {len(attempts)} time(s), at last with {attempts[-1]['why']}"
            return f"{node.folder} has not been run"
    return None


def _cell(plan: CellPlan, study: Study, store: Store, settings: Mapping[str, Any]) -> Cell:
    stages = [study.nodes[key] for key in plan.stages]
    scores = {name: study.nodes[key] for name, key in plan.scores.items()}
    controls = {name: study.nodes[key] for name, key in plan.controls.items()}
    return Cell(
        arm=plan.arm,
        seed=plan.seed,
        settings=settings,
        stages=[stage_result(node, store) for node in stages if store.done(node) is not None],
        scores={
            name: scored(store.result(node), study.spec.evaluations[name].data_path)
            for name, node in scores.items()
            if store.done(node) is not None
        },
        controls={
            name: json.loads(store.result(node).read_text(encoding="utf-8"))
            for name, node in controls.items()
            if store.done(node) is not None
        },
        problem=_problem(plan, study, store),
        chain=plan.stages[-1],
        keys={f"{SCORES} {name}": key for name, key in plan.scores.items()}
        | {f"{CONTROLS} {name}": key for name, key in plan.controls.items()},
    )


def _contrast(given: ContrastSpec) -> Contrast:
    return Contrast(given.arm, given.base, given.evaluation, tuple(given.levels), given.metric)


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
    entries = study.spec.arms
    arms = {cell.arm: entries[cell.arm.partition("[")[0]].about for cell in cells}
    asked = study.spec.report
    found = versions()
    return Results(
        name=study.spec.name,
        question=study.spec.question,
        arms=arms,
        cells=cells,
        primary=_contrast(asked.primary) if asked.primary else None,
        contrasts=[_contrast(one) for one in asked.contrasts],
        margin=asked.margin,
        made={
            "date": time.strftime("%Y-%m-%d"),
            "commit": str(found.get("git_commit")),
            "machine": f"{platform.machine()}, {platform.system()}",
            **{name: str(found[name]) for name in ("torch", "transformers", "deepspeed")},
        },
    )
