"""Reports of `mirage-ds controls`, one a cell → means over seeds and records, as plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.study.report.grid import Column, Grid, Misfit, line_up
from mirage_ds.study.report.statistics import Draws, Estimate, estimate
from mirage_ds.study.results import Cell

Found = dict[str, Any]
OWN = "own"


def controls(cells: Mapping[str, Sequence[Cell]], draws: Draws, holes: list[Found]) -> list[Found]:
    """Average the controls of each arm and evaluation over the seeds that have them.

    Args:
        cells: arm → its cells, one a seed; holes: what cannot be read is added here.

    Returns:
        One entry an arm and evaluation: {"arm", "evaluation", "metric", "conditions", "path"}. "conditions": name →
        an Estimate of the score, and "difference", an Estimate of score − own's on the same seeds and records, None for
        own; {} where no cell has any. "path": each verdict of paths.VERDICTS → an Estimate of its share over both
        injections, and "difference", of injected − other; None where no cell has it.
    """
    entries = []
    for arm, own in cells.items():
        for evaluation in dict.fromkeys(name for cell in own for name in cell.controls):
            reports = {cell.seed: cell.controls[evaluation] for cell in own if evaluation in cell.controls}
            entry = _entry(arm, evaluation, reports, draws, holes)
            if entry["conditions"] or entry["path"]:
                entries.append(entry)
    return entries


def _entry(
    arm: str, evaluation: str, reports: Mapping[int, Mapping[str, Any]], draws: Draws, holes: list[Found]
) -> Found:
    scores: dict[str, dict[int, Column]] = {}
    follows: dict[str, dict[int, Column]] = {}
    metric = None
    for seed, report in reports.items():
        try:
            if "conditions" in report:
                metric = report["conditions"][OWN]["score"]["metric"]
                for name, values in _scores(report).items():
                    scores.setdefault(name, {})[seed] = values
            if "path" in report:
                for name, values in _follows(report["path"]).items():
                    follows.setdefault(name, {})[seed] = values
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problem = f"its controls cannot be read ({type(error).__name__}: {error})"
            holes.append({"arm": arm, "seed": seed, "evaluation": evaluation, "problem": problem})
    found: Found = {"arm": arm, "evaluation": evaluation, "metric": metric, "conditions": {}, "path": None}
    for name, columns in scores.items():
        try:
            found["conditions"][name] = _condition(name, columns, scores[OWN], draws)
        except Misfit as error:
            problem = f"controls, condition {name}: {error}"
            holes.append({"arm": arm, "seed": None, "evaluation": evaluation, "problem": problem})
    if follows:
        try:
            found["path"] = _path(follows, draws)
        except Misfit as error:
            problem = f"controls, path: {error}"
            holes.append({"arm": arm, "seed": None, "evaluation": evaluation, "problem": problem})
    return found


def _scores(report: Mapping[str, Any]) -> dict[str, Column]:
    """Return each condition's scores, a record each."""
    answers = report["answers"]
    lines = [str(one["line"]) for one in answers]
    metric = report["conditions"][OWN]["score"]["metric"]
    return {
        name: _column(lines, [float(one["conditions"][name]["metrics"][metric]) for one in answers])
        for name in report["conditions"]
    }


def _follows(path: Mapping[str, Any]) -> dict[str, Column]:
    """Return for each verdict in how many of its two injections (0, ½, 1) a record's answer met it."""
    lines = [str(one["line"]) for one in path["answers"]]
    met = [[one["follows"][name] for name in "AB"] for one in path["answers"]]
    shares = {kind: [verdicts.count(kind) / 2 for verdicts in met] for kind in VERDICTS}
    return {kind: _column(lines, values) for kind, values in shares.items()}


def _column(lines: Sequence[str], values: Sequence[float]) -> Column:
    if len(set(lines)) < len(lines):
        raise ValueError("a line stands there twice")
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError("no answers, or a score that is not finite")
    # The controls' answers do not say a record's level.
    return Column(tuple(lines), ("?",) * len(lines), array)


def _mean(grid: Grid, values: np.ndarray, draws: Draws) -> Estimate:
    return estimate(values, grid.sizes, draws)[0]


def _condition(name: str, columns: Mapping[int, Column], own: Mapping[int, Column], draws: Draws) -> Found:
    grid = line_up([columns, own])
    score = asdict(_mean(grid, grid.values[0], draws))
    apart = None if name == OWN else asdict(_mean(grid, grid.values[0] - grid.values[1], draws))
    return {**score, "difference": apart}


def _path(follows: Mapping[str, Mapping[int, Column]], draws: Draws) -> Found:
    grid = line_up([follows[kind] for kind in VERDICTS])
    shares = dict(zip(VERDICTS, grid.values, strict=True))
    found = {kind: asdict(_mean(grid, values, draws)) for kind, values in shares.items()}
    return {**found, "difference": asdict(_mean(grid, shares["injected"] - shares["other"], draws))}
