"""Reports of `mirage-ds controls`, one a cell → means over seeds and records, as plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.study.report.grid import NO_LEVEL, Column, Grid, Misfit, Work, line_up, make_column
from mirage_ds.study.report.statistics import Draws, estimate

Found = dict[str, Any]
OWN = "own"
# Condition or verdict → seed → its scores.
Columns = dict[str, dict[int, Column]]


def controls(work: Work) -> list[Found]:
    """Average the controls of each arm and evaluation over the seeds that have them.

    Returns:
        One entry an arm and evaluation: {"arm", "evaluation", "metric", "conditions", "path"}. "conditions": name →
        an Estimate of the score, and "difference", an Estimate of score − own's on the same seeds and records, None for
        own; {} where no cell has any. "path": each verdict of paths.VERDICTS → an Estimate of its share over both
        injections, and "difference", of injected − other; None where no cell has it. What cannot be read is a hole.
    """
    entries = []
    for arm, cells in work.cells.items():
        for evaluation in dict.fromkeys(name for cell in cells for name in cell.controls):
            reports = {cell.seed: cell.controls[evaluation] for cell in cells if evaluation in cell.controls}
            entry = _entry(arm, evaluation, reports, work)
            if entry["conditions"] or entry["path"]:
                entries.append(entry)
    return entries


def _entry(arm: str, evaluation: str, reports: Mapping[int, Mapping[str, Any]], work: Work) -> Found:
    scores: Columns = {}
    follows: Columns = {}
    found: Found = {"arm": arm, "evaluation": evaluation, "metric": None, "conditions": {}, "path": None}
    for seed, report in reports.items():
        try:
            if "conditions" in report:
                found["metric"] = report["conditions"][OWN]["score"]["metric"]
                for name, values in _scores(report, found["metric"]).items():
                    scores.setdefault(name, {})[seed] = values
            if "path" in report:
                for name, values in _follows(report["path"]["answers"]).items():
                    follows.setdefault(name, {})[seed] = values
        except (KeyError, TypeError, ValueError, IndexError) as error:
            work.miss(arm, seed, f"its controls cannot be read ({type(error).__name__}: {error})", evaluation)
    for name, columns in scores.items():
        try:
            found["conditions"][name] = _condition(name, line_up([columns, scores[OWN]]), work.draws)
        except Misfit as error:
            work.miss(arm, None, f"controls, condition {name}: {error}", evaluation)
    if follows:
        try:
            found["path"] = _path(line_up([follows[kind] for kind in VERDICTS]), work.draws)
        except Misfit as error:
            work.miss(arm, None, f"controls, path: {error}", evaluation)
    return found


def _scores(report: Mapping[str, Any], metric: str) -> dict[str, Column]:
    """Return each condition's scores, a record each."""
    return {
        name: _column(
            report["answers"], [float(one["conditions"][name]["metrics"][metric]) for one in report["answers"]]
        )
        for name in report["conditions"]
    }


def _follows(answers: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return for each verdict in how many of its two injections (0, ½, 1) a record's answer met it."""
    met = [[one["follows"][name] for name in "AB"] for one in answers]
    return {kind: _column(answers, [verdicts.count(kind) / 2 for verdicts in met]) for kind in VERDICTS}


def _column(answers: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Column:
    lines = [str(one["line"]) for one in answers]
    if len(set(lines)) < len(lines):
        raise ValueError("a line stands there twice")
    if not lines or not np.isfinite(values).all():
        raise ValueError("no answers, or a score that is not finite")
    # The controls' answers do not say a record's level.
    return make_column(lines, [NO_LEVEL] * len(lines), values)


def _mean(grid: Grid, values: np.ndarray, draws: Draws) -> Found:
    return asdict(estimate(values, grid.sizes, draws)[0])


def _condition(name: str, grid: Grid, draws: Draws) -> Found:
    score, own = grid.values
    return {**_mean(grid, score, draws), "difference": None if name == OWN else _mean(grid, score - own, draws)}


def _path(grid: Grid, draws: Draws) -> Found:
    shares = dict(zip(VERDICTS, grid.values, strict=True))
    found = {kind: _mean(grid, values, draws) for kind, values in shares.items()}
    return {**found, "difference": _mean(grid, shares["injected"] - shares["other"], draws)}
