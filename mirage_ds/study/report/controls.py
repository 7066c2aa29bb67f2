"""Reports of `mirage-ds controls`, one a cell → means over seeds and records, as plain dicts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.errors import reason
from mirage_ds.study.report.grid import NO_LEVEL, Column, Grid, Work, line_up, make_column
from mirage_ds.study.report.statistics import Draws, estimate

Found = dict[str, Any]
# One record's answers, as `mirage-ds controls` writes them.
Answer = Mapping[str, Any]
OWN = "own"


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
            miss = partial(work.miss, arm, None, evaluation=evaluation)
            try:
                entries.append({"arm": arm, "evaluation": evaluation, **_averaged(reports, work.draws, miss)})
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                miss(f"its controls cannot be read ({reason(error)})")
    return entries


def _averaged(reports: Mapping[int, Mapping[str, Any]], draws: Draws, miss: Callable[[str], None]) -> Found:
    """Average the reports of an arm, seed → report."""
    found: Found = {"metric": None, "conditions": {}, "path": None}
    scored = {seed: one for seed, one in reports.items() if "conditions" in one}
    if scored:
        names = next(iter(scored.values()))["conditions"]
        metric = found["metric"] = names[OWN]["score"]["metric"]
        answers = {seed: one["answers"] for seed, one in scored.items()}
        grid = _grid(answers, names, lambda answer, name: answer["conditions"][name]["metrics"][metric])
        if grid.left_out:
            miss(f"{grid.left_out} records have no score under some condition or seed of its controls and are left out")
        scores = dict(zip(names, grid.values, strict=True))
        for name, values in scores.items():
            apart = None if name == OWN else _mean(grid, values - scores[OWN], draws)
            found["conditions"][name] = {**_mean(grid, values, draws), "difference": apart}
    answers = {seed: one["path"]["answers"] for seed, one in reports.items() if "path" in one}
    if answers:
        # A record's answer meets a verdict in 0, 1 or 2 of its two injections.
        grid = _grid(answers, VERDICTS, lambda answer, kind: list(answer["follows"].values()).count(kind) / 2)
        shares = dict(zip(VERDICTS, grid.values, strict=True))
        found["path"] = {kind: _mean(grid, values, draws) for kind, values in shares.items()}
        found["path"]["difference"] = _mean(grid, shares["injected"] - shares["other"], draws)
    return found


def _grid(answers: Mapping[int, Sequence[Answer]], names: Iterable[str], value: Callable[[Answer, str], float]) -> Grid:
    """Line up what each record has under each name; answers: seed → a record each. They do not say a record's level."""

    def scored(own: Sequence[Answer], name: str) -> Column:
        return make_column([str(one["line"]) for one in own], [NO_LEVEL] * len(own), [value(one, name) for one in own])

    return line_up([{seed: scored(own, name) for seed, own in answers.items()} for name in names])


def _mean(grid: Grid, values: np.ndarray, draws: Draws) -> Found:
    return estimate(values, list(grid.levels.values()), draws)[0]
