"""Results → the report as a plain dict, which is what report.json holds, and its folder. S seeds, N records."""

import base64
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import RESAMPLES
from mirage_ds.files import write_atomically
from mirage_ds.study.report.contrasts import Report, contrasts, controls
from mirage_ds.study.report.statistics import Column, Draws, Misfit, Work, column, level_key, line_up
from mirage_ds.study.report.text import markdown, page, sheet
from mirage_ds.study.results import SCORES, Cell, Results, StageResult

# What a chain cost, in the units of StageResult.
COSTS = ("steps", "rows", "tokens", "flops", "seconds", "samples_s", "peak_gb")


def build(results: Results, resamples: int = RESAMPLES, seed: int = 0) -> Report:
    """Put the whole report together.

    What is wrong with a cell, a contrast or a control becomes one of its holes; nothing but a study without any score
    is refused.

    Args:
        resamples: of every bootstrap; seed: of their draws.

    Returns:
        {"name", "question", "margin", "made", "statistics", "arms", "holes", "primary", "contrasts", "controls",
        "chance": evaluation → what `_chance` returns, "examples": those of the results, "rollouts": what `rollouts`
        returns, both without pictures}, as strict JSON has it: numbers that are not finite are None, dates are texts.
        "arms" is a list in the study's order of what `_arm` returns, "holes" one of {"arm", "seed", "evaluation",
        "problem"}, None where it is about no single one; for "primary" and "contrasts" see `contrasts`, for "controls"
        `controls`.

    Raises:
        UserError: no cell has a score.
    """
    if not any(cell.is_scored for cell in results.cells):
        what = f"none of its {len(results.cells)} cells has scores yet, so there is nothing to report"
        raise UserError(f"study {results.name!r}: {what}; see what became of its runs first")
    work = Work(results, Draws(resamples, seed))
    arms = [_arm(name, results.arms[name], cells, work) for name, cells in work.cells.items()]
    primary, others = contrasts(results.report, work)
    report = {
        "name": results.name,
        "question": results.question,
        "margin": results.report.margin,
        "made": dict(results.made),
        "statistics": {"resamples": resamples, "seed": seed},
        "arms": arms,
        "holes": work.holes,
        "primary": primary,
        "contrasts": others,
        "controls": controls(work),
        "chance": {name: _chance(scores, name, results.cells) for name, scores in results.chance.items()},
        "examples": _without_pictures(results.examples),
        "rollouts": _without_pictures(rollouts(results)),
    }
    # Settings have what YAML has, and an export's costs may be infinite.
    plain: Report = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
    return plain


def _without_pictures(shown: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if key != "picture"} for one in shown]


def rollouts(results: Results) -> list[dict[str, Any]]:
    """Return StageResult.rollouts of each arm's first seed that has some, with "arm" and "seed"."""
    first = {cell.arm: cell for cell in reversed(results.cells) if any(stage.rollouts for stage in cell.stages)}
    cells = [first[arm] for arm in results.arms if arm in first]
    return [{"arm": one.arm, "seed": one.seed, **own} for one in cells for part in one.stages for own in part.rollouts]


def _chance(scores: Mapping[str, float], evaluation: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Average the scores of the best constant answer (record → score): {"overall", "levels": level → mean}."""
    scored = next(cell.scores[evaluation] for cell in cells if evaluation in cell.scores)
    level_of = dict(zip(scored.records, scored.levels, strict=True))
    values = pd.Series(dict(scores)).loc[lambda own: own.index.isin(level_of)]
    return {"overall": values.mean(), "levels": values.groupby(level_of).mean().to_dict()}


def _arm(name: str, description: str, cells: Sequence[Cell], work: Work) -> dict[str, Any]:
    """Gather what there is about one arm.

    Returns:
        {"name", "description", "settings", "seeds": {"scored", "planned"}, "evaluations": name → what `_evaluation`
        returns, "cost": mean over the seeds with scores, "cells": one entry a seed, {"seed", "problem"} and what
        `chain` returns}
    """
    evaluations = {evaluation: _evaluation(name, evaluation, cells, work) for evaluation in work.metrics}
    costs = [{"seed": cell.seed, "problem": cell.problem, **chain(cell.stages)} for cell in cells]
    finished = [one for one, cell in zip(costs, cells, strict=True) if cell.is_scored]
    return {
        "name": name,
        "description": description,
        "settings": _settings(cells),
        "seeds": {"scored": len(finished), "planned": len(cells)},
        "evaluations": {evaluation: found for evaluation, found in evaluations.items() if found is not None},
        "cost": {key: _mean(one[key] for one in finished) for key in COSTS},
        "cells": costs,
    }


def _evaluation(arm: str, evaluation: str, cells: Sequence[Cell], work: Work) -> dict[str, Any] | None:
    """Average one evaluation of an arm: over the records that all its seeds have, and each seed by itself.

    Returns:
        {"metric", "overall": an Estimate, "levels": level → an Estimate, "by_seed": [{"seed", "score", "records",
        "levels": level → {"score", "records"}}], "other_metrics": name → mean}; None without scores.
    """
    metric, *names = work.metrics[evaluation]
    columns: dict[int, Column] = {}
    answered = []
    for cell in cells:
        scores = cell.scores.get(evaluation)
        if scores is None or not scores.records:
            # An evaluation may be of some arms only.
            asked = not cell.keys or f"{SCORES} {evaluation}" in cell.keys
            if asked and cell.is_scored:
                work.miss(arm, cell.seed, "it has no scores of this evaluation", evaluation)
            continue
        answered.append(scores)
        found = column(scores, metric)
        if empty := len(scores.records) - len(found):
            work.miss(arm, cell.seed, f"{empty} records have no number for {metric!r} and are left out", evaluation)
        if len(found):
            columns[cell.seed] = found
    if not columns:
        return None
    try:
        grid = line_up([columns])
    except Misfit as error:
        work.miss(arm, None, f"its seeds cannot be averaged: {error}", evaluation)
        return None
    if grid.left_out:
        fault = f"{grid.left_out} records do not have scores under every seed and are left out of the mean"
        work.miss(arm, None, fault, evaluation)
    overall, levels = grid.estimate(grid.values[0], work.draws)
    return {
        "metric": metric,
        "overall": overall,
        "levels": levels,
        "by_seed": [{"seed": seed, **_of_seed(found)} for seed, found in sorted(columns.items())],
        "other_metrics": {name: _mean(_mean(column(one, name)["value"]) for one in answered) for name in names},
    }


def _of_seed(found: Column) -> dict[str, Any]:
    levels = sorted(found.groupby("level")["value"], key=lambda one: level_key(one[0]))
    return {**_score(found["value"]), "levels": {level: _score(values) for level, values in levels}}


def _score(values: pd.Series) -> dict[str, Any]:
    return {"score": _mean(values), "records": len(values)}


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
    sums: dict[str, Any] = {key: sum(getattr(one, key) for one in stages) if stages else None for key in COSTS[:5]}
    return {
        **sums,
        "samples_s": sums["rows"] / sums["seconds"] if sums["seconds"] else None,
        "peak_gb": max((one.peak_gb for one in stages if one.peak_gb is not None), default=None),
        "stages": [{key: of for key, of in vars(one).items() if key not in ("curve", "rollouts")} for one in stages],
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return fmean(known) if known else None


def write_report(results: Results, out: Path, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Write report.json, report.csv, report.md, report.html and figures/*.png; each is whole or the old one.

    The folder `figures` belongs to the report: pictures of an earlier one that are no longer made are removed. The same
    results give the same files, to the byte.

    Args:
        out: made if it does not exist; resamples: of every bootstrap.

    Returns:
        What report.json holds; see `build`.

    Raises:
        UserError: no cell has a score.
    """
    report = build(results, resamples)
    folder = out / "figures"
    drawn = list(_figures(results, report))
    pictures = [one["picture"] for one in results.examples]
    pictures += [one["picture"] and base64.b64decode(one["picture"]) for one in rollouts(results)]
    examples = [(f"example-{number}", one) for number, one in enumerate(pictures, 1)]
    named = {name: data for name, data, _ in drawn} | {name: data for name, data in examples if data}
    paths = [f"figures/{name}.png" if name in named else None for name, _ in examples]
    texts = {
        "csv": sheet(report),
        "md": markdown(report, [(f"figures/{name}.png", text) for name, _, text in drawn], paths),
        "html": page(report, [(data, text) for _, data, text in drawn], [data for _, data in examples]),
        "json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, data in named.items():
        write_atomically(folder / f"{name}.png", data)
    for name in _earlier(out) - named.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    for kind, text in texts.items():
        # A record's level or a study's words may hold half of a surrogate pair, which UTF-8 has not.
        write_atomically(out / f"report.{kind}", text.encode("utf-8", "backslashreplace"))
    return report


def _earlier(out: Path) -> set[str]:
    """Name the figures of the report that is replaced; other pictures beside them are not ours."""
    file = out / "report.md"
    return set(re.findall(r"\(figures/([^/)]+)\.png\)", file.read_text(encoding="utf-8"))) if file.is_file() else set()


def _figures(results: Results, report: dict[str, Any]) -> Iterator[tuple[str, bytes, str]]:
    """Yield each figure's name, PNG and caption."""
    from mirage_ds.analysis.inspect import style
    from mirage_ds.study.report import figures

    taken: Counter[str] = Counter()
    with style.styled():
        for one in (
            figures.lead(report),
            *figures.scores(report),
            *figures.contrasts(report),
            *figures.sweeps(report),
            *figures.curves(results, report),
            *figures.controls(report),
        ):
            # Two evaluations whose names differ in odd characters alone.
            taken[one.name] += 1
            name = one.name if taken[one.name] == 1 else f"{one.name}-{taken[one.name]}"
            yield name, style.png(one.figure), one.caption
