"""Results → the report as a plain dict, which is what report.json holds. S seeds, N records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mirage_ds.analysis.controls.statistics import RESAMPLES
from mirage_ds.errors import UserError
from mirage_ds.study.report.answers import controls
from mirage_ds.study.report.contrasts import contrasts
from mirage_ds.study.report.grid import Column, Misfit, column, level_key, line_up
from mirage_ds.study.report.statistics import Draws, estimate
from mirage_ds.study.results import SCORES, Cell, Results, StageResult

Report = dict[str, Any]
# What a chain cost, in the units of StageResult.
COSTS = ("steps", "rows", "tokens", "flops", "seconds", "samples_s", "peak_gb")
# Of a record without a level, as in Scored.
NO_LEVEL = "?"


def build(results: Results, resamples: int = RESAMPLES, seed: int = 0) -> Report:
    """Put the whole report together.

    What is wrong with a cell, a contrast or a control becomes one of its holes; nothing but a study without any score
    is refused.

    Args:
        resamples: of every bootstrap; seed: of their draws.

    Returns:
        {"name", "question", "margin", "made", "statistics", "arms", "holes", "primary", "contrasts", "controls"}, as
        strict JSON has it (see `plain`). "arms" is a list in the study's order of what `_arm` returns, "holes" one of
        {"arm", "seed", "evaluation", "problem"}, None where it is about no single one; for "primary" and "contrasts"
        see contrasts.contrasts, for "controls" answers.controls.

    Raises:
        UserError: no cell has a score.
    """
    if not any(cell.scores.get(name) for cell in results.cells for name in cell.scores):
        raise UserError(
            f"study {results.name!r}: none of its {len(results.cells)} cells has scores yet, so there is nothing to "
            "report; see what became of its runs first"
        )
    holes: list[dict[str, Any]] = []
    draws = Draws(resamples, seed)
    cells = _by_arm(results, holes)
    metrics = _metrics(results.cells)
    arms = [_arm(name, results, own, metrics, draws, holes) for name, own in cells.items()]
    primary, others = contrasts(results, cells, metrics, draws, holes)
    report = {
        "name": results.name,
        "question": results.question,
        "margin": results.margin,
        "made": dict(results.made),
        "statistics": {"resamples": resamples, "seed": seed},
        "arms": arms,
        "holes": holes,
        "primary": primary,
        "contrasts": others,
        "controls": controls(cells, draws, holes),
    }
    return plain(report)


def plain(value: Any) -> Any:
    """Return a value as strict JSON has it: text keys, numbers that are finite or else None, texts that UTF-8 holds."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def _by_arm(results: Results, holes: list[dict[str, Any]]) -> dict[str, list[Cell]]:
    """Sort cells by arm, in the study's order, and by seed; say which have no scores."""
    names = dict.fromkeys([*results.arms, *(cell.arm for cell in results.cells)])
    found: dict[str, list[Cell]] = {}
    for name in names:
        own: dict[int, Cell] = {}
        for cell in sorted((one for one in results.cells if one.arm == name), key=lambda one: one.seed):
            if cell.seed in own:
                holes.append(hole(name, cell.seed, "a second cell of this arm and seed is left out"))
                continue
            own[cell.seed] = cell
            if cell.problem or not any(cell.scores.values()):
                holes.append(hole(name, cell.seed, cell.problem or "it has no scores"))
        if not own:
            holes.append(hole(name, None, "the arm has no cells"))
        found[name] = list(own.values())
    return found


def hole(arm: str | None, seed: int | None, problem: str, evaluation: str | None = None) -> dict[str, Any]:
    """Write down what is missing, and where."""
    return {"arm": arm, "seed": seed, "evaluation": evaluation, "problem": problem}


def _metrics(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Return each evaluation's metrics, in its first scored record's order: the first is the task's success."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for name, scores in cell.scores.items():
            if scores and name not in found and scores[0].metrics:
                found[name] = list(scores[0].metrics)
    return found


def _arm(
    name: str,
    results: Results,
    cells: Sequence[Cell],
    metrics: Mapping[str, list[str]],
    draws: Draws,
    holes: list[dict[str, Any]],
) -> dict[str, Any]:
    """Gather what there is about one arm.

    Returns:
        {"name", "description", "settings", "seeds": {"scored", "planned"}, "evaluations": name → what `_evaluation`
        returns, "cost": mean over the seeds with scores, "cells": one entry a seed, {"seed", "problem"} and what
        `chain` returns}
    """
    scored = [cell for cell in cells if any(cell.scores.values())]
    evaluations = {}
    for evaluation, named in metrics.items():
        found = _evaluation(name, evaluation, named, cells, draws, holes)
        if found is not None:
            evaluations[evaluation] = found
    costs = [{"seed": cell.seed, "problem": cell.problem, **chain(cell.stages)} for cell in cells]
    finished = [one for one, cell in zip(costs, cells, strict=True) if any(cell.scores.values())]
    return {
        "name": name,
        "description": results.arms.get(name, ""),
        "settings": _settings(cells),
        "seeds": {"scored": len(scored), "planned": len(cells)},
        "evaluations": evaluations,
        "cost": {key: _mean(one[key] for one in finished) for key in COSTS},
        "cells": costs,
    }


def _evaluation(
    arm: str,
    evaluation: str,
    metrics: Sequence[str],
    cells: Sequence[Cell],
    draws: Draws,
    holes: list[dict[str, Any]],
) -> dict[str, Any] | None:
    """Average one evaluation of an arm: over the records that all its seeds have, and each seed by itself.

    Returns:
        {"metric", "overall": an Estimate, "levels": level → an Estimate, "by_seed": [{"seed", "score", "records",
        "levels": level → {"score", "records"}}], "other_metrics": name → mean}; None without scores.
    """
    columns: dict[int, Column] = {}
    others: dict[str, list[float]] = {metric: [] for metric in metrics[1:]}
    for cell in cells:
        if not cell.scores.get(evaluation):
            # An evaluation may be of some arms only.
            asked = not cell.keys or f"{SCORES} {evaluation}" in cell.keys
            if asked and any(cell.scores.values()):
                holes.append(hole(arm, cell.seed, "it has no scores of this evaluation", evaluation))
            continue
        found = column(cell.scores[evaluation], metrics[0])
        holes.extend(hole(arm, cell.seed, fault, evaluation) for fault in found.faults)
        if len(found.records):
            columns[cell.seed] = found
        for metric, means in others.items():
            values = column(cell.scores[evaluation], metric).values
            means.extend([float(values.mean())] if len(values) else [])
    if not columns:
        return None
    try:
        grid = line_up([columns])
    except Misfit as error:
        holes.append(hole(arm, None, f"its seeds cannot be averaged: {error}", evaluation))
        return None
    if grid.left_out:
        fault = f"{grid.left_out} records do not have scores under every seed and are left out of the mean"
        holes.append(hole(arm, None, fault, evaluation))
    overall, levels = estimate(grid.values[0], grid.sizes, draws)
    return {
        "metric": metrics[0],
        "overall": asdict(overall),
        "levels": {name: asdict(one) for name, one in zip(grid.levels, levels, strict=True)},
        "by_seed": [{"seed": seed, **_seed(found)} for seed, found in sorted(columns.items())],
        "other_metrics": {metric: _mean(means) for metric, means in others.items()},
    }


def _seed(found: Column) -> dict[str, Any]:
    levels: dict[str, list[float]] = {}
    for level, value in zip(found.levels, found.values.tolist(), strict=True):
        levels.setdefault(level, []).append(value)
    return {
        **_score(found.values.tolist()),
        "levels": {level: _score(levels[level]) for level in sorted(levels, key=level_key)},
    }


def _score(values: Sequence[float]) -> dict[str, Any]:
    return {"score": math.fsum(values) / len(values), "records": len(values)}


def _settings(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the arm's settings; where its cells differ, what each of them has."""
    found: dict[str, list[Any]] = {}
    for cell in cells:
        for key, value in cell.settings.items():
            values = found.setdefault(str(key), [])
            if value not in values:
                values.append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def chain(stages: Sequence[StageResult]) -> dict[str, Any]:
    """Add up what a chain of stages cost; None where no stage says, or where there is none.

    Returns:
        Each of COSTS (sums; samples/s over the whole chain; the highest peak), and "stages", each with its own.
    """
    stated = ("name", "key", "stage", *COSTS)
    total: dict[str, Any] = {key: sum(getattr(one, key) for one in stages) if stages else None for key in COSTS[:5]}
    peaks = [one.peak_gb for one in stages if one.peak_gb is not None]
    seconds = total["seconds"]
    return {
        **total,
        "samples_s": total["rows"] / seconds if seconds else None,
        "peak_gb": max(peaks, default=None),
        "stages": [{key: getattr(one, key) for key in stated} for one in stages],
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(one) for one in values if one is not None and math.isfinite(one)]
    return math.fsum(known) / len(known) if known else None
