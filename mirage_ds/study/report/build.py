"""Results → the report as a plain dict, which is what report.json holds, and its folder. S seeds, N records."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.controls.statistics import holm, unseen, visible_mean, visible_share
from mirage_ds.errors import UserError, reason
from mirage_ds.evaluate.scoring import RESAMPLES, is_binary
from mirage_ds.files import write_atomically
from mirage_ds.study.report.statistics import (
    LEVEL,
    NO_LEVEL,
    Column,
    Draws,
    Grid,
    Misfit,
    Work,
    column,
    compare,
    level_key,
    line_up,
    make_column,
)
from mirage_ds.study.report.text import markdown, page, sheet
from mirage_ds.study.results import SCORES, Cell, Results, StageResult
from mirage_ds.study.spec import ContrastSpec, ReportSpec

Report = dict[str, Any]
# One record's answers, as `mirage-ds controls` writes them.
Answer = Mapping[str, Any]
OWN = "own"
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
        "chance": evaluation → what `_chance` returns, "examples": those of the results without their pictures}, as
        strict JSON has it: numbers that are not finite are None, dates are texts. "arms" is a list in the study's order
        of what `_arm` returns, "holes" one of {"arm", "seed", "evaluation", "problem"}, None where it is about no
        single one; for "primary" and "contrasts" see `contrasts`, for "controls" `controls`.

    Raises:
        UserError: no cell has a score.
    """
    if not any(cell.is_scored for cell in results.cells):
        raise UserError(
            f"study {results.name!r}: none of its {len(results.cells)} cells has scores yet, so there is nothing to "
            "report; see what became of its runs first"
        )
    work = Work(Draws(resamples, seed))
    _gather(results, work)
    for problem in results.unseen:
        work.miss(None, None, problem)
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
        "examples": [{key: value for key, value in one.items() if key != "picture"} for one in results.examples],
    }
    # Settings have what YAML has, and an export's costs may be infinite.
    plain: Report = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
    return plain


def _gather(results: Results, work: Work) -> None:
    """Sort cells by arm, in the study's order, and by seed; say which have no scores; name the metrics.

    An evaluation's metrics stand in the order of its first scored record: the first is the task's success.
    """
    for name in results.arms:
        work.cells[name] = sorted((cell for cell in results.cells if cell.arm == name), key=lambda cell: cell.seed)
        for cell in work.cells[name]:
            if cell.problem or not cell.is_scored:
                work.miss(name, cell.seed, cell.problem or "it has no scores")
            for evaluation, scores in cell.scores.items():
                if scores.metrics:
                    work.metrics.setdefault(evaluation, list(scores.metrics))


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
    others: dict[str, list[float | None]] = {name: [] for name in names}
    for cell in cells:
        scores = cell.scores.get(evaluation)
        if scores is None or not scores.records:
            # An evaluation may be of some arms only.
            asked = not cell.keys or f"{SCORES} {evaluation}" in cell.keys
            if asked and cell.is_scored:
                work.miss(arm, cell.seed, "it has no scores of this evaluation", evaluation)
            continue
        found = column(scores, metric)
        empty = len(scores.records) - len(found)
        if empty:
            work.miss(arm, cell.seed, f"{empty} records have no number for {metric!r} and are left out", evaluation)
        if len(found):
            columns[cell.seed] = found
        for name, means in others.items():
            means.append(_mean(column(scores, name)["value"]))
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
        "other_metrics": {name: _mean(means) for name, means in others.items()},
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
        "stages": [{key: value for key, value in vars(one).items() if key != "curve"} for one in stages],
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
    examples = [(f"example-{number}", one["picture"]) for number, one in enumerate(results.examples, 1)]
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
        for name, figure, caption in (
            figures.lead(report),
            *figures.scores(report),
            *figures.contrasts(report),
            *figures.sweeps(report),
            *figures.curves(results, report),
            *figures.controls(report),
        ):
            # Two evaluations whose names differ in odd characters alone.
            taken[name] += 1
            yield name if taken[name] == 1 else f"{name}-{taken[name]}", style.png(figure), caption


def contrasts(asked: ReportSpec, work: Work) -> tuple[Report | None, list[Report]]:
    """Compare what the study wants compared; a contrast that cannot be made is a hole.

    Returns:
        (primary, others). Each has {"arm", "base", "evaluation", "levels", "metric", "problem"} and, where "problem" is
        None, what `compare` returns ("by_level": name → an Estimate), "means" of arm and base over the same seeds
        and records, "families" (see `_families`), "notes", and "steps", the optimizer steps of the chains, seed by
        seed. "p_holm" is adjusted among the others; the primary has none.
    """
    primary = _contrast(asked.primary, asked.margin, work) if asked.primary else None
    others = [_contrast(one, asked.margin, work) for one in dict.fromkeys(asked.contrasts) if one != asked.primary]
    tested = [one for one in others if one.get("p") is not None]
    for one, adjusted in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = adjusted
    return primary, others


def _contrast(contrast: ContrastSpec, margin: float, work: Work) -> Report:
    first = next(iter(work.metrics.get(contrast.evaluation, ())), None)
    found: Report = {**contrast.model_dump(mode="json"), "metric": contrast.metric or first, "problem": None}
    sides = {"arm": contrast.arm, "base": contrast.base}
    try:
        pair = [_columns(name, found, work) for name in sides.values()]
        grid = line_up(pair)
    except Misfit as error:
        found["problem"] = f"contrast {contrast.arm} − {contrast.base}: {error}"
        work.miss(None, None, found["problem"], contrast.evaluation)
        return found
    compared = compare(grid.values[0], grid.values[1], list(grid.levels.values()), margin, work.draws)
    found |= compared | {
        "by_level": dict(zip(grid.levels, compared["by_level"], strict=True)),
        "by_seed": [
            {"seed": seed, "difference": one} for seed, one in zip(grid.seeds, compared["by_seed"], strict=True)
        ],
        "means": {side: float(values.mean()) for side, values in zip(sides, grid.values, strict=True)},
        "p_holm": None,
    }
    found["families"] = _families(found, [cell for name in sides.values() for cell in work.cells[name]])
    found["notes"] = _notes(found, grid, [set(one) for one in pair])
    found["steps"] = {
        side: [sum(stage.steps for stage in cell.stages) for cell in work.cells[name] if cell.seed in grid.seeds]
        for side, name in sides.items()
    }
    if len({tuple(steps) for steps in found["steps"].values()}) > 1:
        found["notes"].append("not step-matched")
    return found


def _columns(name: str, found: Report, work: Work) -> dict[int, Column]:
    """Read one arm's scores, seed by seed."""
    columns = {
        cell.seed: column(cell.scores[found["evaluation"]], found["metric"], found["levels"])
        for cell in work.cells[name]
        if found["evaluation"] in cell.scores
    }
    columns = {seed: one for seed, one in columns.items() if len(one)}
    if not columns:
        at = f" at levels {', '.join(found['levels'])}" if found["levels"] else ""
        by = f" by {found['metric']}" if found["metric"] else ""
        raise Misfit(f"no cell of {name!r} has scores{by} in evaluation {found['evaluation']!r}{at}")
    return columns


def _families(found: Report, cells: Sequence[Cell]) -> list[Report]:
    """Find the compared seeds whose chains have a run in common, such as a base that was trained once for all of them.

    They differ less than seeds that share nothing, and the interval over seeds knows nothing of it.

    Returns:
        One entry a group of two or more, {"runs": names of the runs that all of them share, or that some do where
        there is none; "seeds", "difference": their mean}; [] where every seed stands alone.
    """
    apart = {one["seed"]: one["difference"] for one in found["by_seed"]}
    users: dict[str, set[int]] = {}
    for cell in cells:
        if cell.seed in apart:
            for stage in cell.stages:
                users.setdefault(stage.key, set()).add(cell.seed)
    groups: list[set[int]] = []
    for seeds in users.values():
        kin = [group for group in groups if group & seeds]
        groups = [group for group in groups if group not in kin] + [seeds.union(*kin)]
    families = []
    for seeds in sorted((group for group in groups if len(group) > 1), key=min):
        runs = [run for run, own in users.items() if own == seeds]
        runs = runs or [run for run, own in users.items() if len(own) > 1 and own <= seeds]
        difference = sum(apart[seed] for seed in seeds) / len(seeds)
        families.append({"runs": runs, "seeds": sorted(seeds), "difference": difference})
    return families


def _kinship(families: Sequence[Report], count: int) -> list[str]:
    """Say what seeds share; `count` is the number of all that were compared."""
    if not families:
        return []
    if len(families) == 1 and len(families[0]["seeds"]) == count:
        return [f"all seeds share {' and '.join(families[0]['runs'])}: the interval says nothing about another one"]
    groups = "; ".join(
        f"seeds {', '.join(map(str, one['seeds']))} share {' and '.join(one['runs'])} ({one['difference']:+.3f})"
        for one in families
    )
    alone = count - sum(len(one["seeds"]) for one in families)
    groups += f"; {alone} share nothing" if alone else ""
    return [f"{groups}: such seeds are not independent, and the interval and the test take them as if they were"]


def _notes(found: Report, grid: Grid, seeds: Sequence[set[int]]) -> list[str]:
    """Say what the numbers alone would hide."""
    notes = []
    alone = len(set.union(*seeds)) - len(grid.seeds)
    if alone:
        notes.append(f"{alone} seeds have scores in one of the two arms only and are left out")
    if grid.left_out:
        notes.append(f"{grid.left_out} records do not have scores in every cell and are left out")
    if len(grid.seeds) == 1:
        notes.append("one seed: the interval is over records alone and says nothing about another training run")
    elif len(grid.seeds) < 5:
        notes.append(f"{len(grid.seeds)} seeds: the interval is too narrow, and there is no test")
    if found["least_p"] is not None and found["least_p"] > 0.05:
        notes.append(f"with {len(grid.seeds)} seeds p cannot fall below {found['least_p']:.4f}")
    notes += _kinship(found["families"], len(grid.seeds))
    if not (grid.values[0] != grid.values[1]).any():
        notes.append("the two do not differ in any record: the interval has no width and says nothing about others")
    return [*notes, *_blind(found, grid)]


def _blind(found: Report, grid: Grid) -> Iterator[str]:
    """Say, where no difference was found and the test can find one, which ones were too small for it."""
    one, tests = found["difference"], found["p"] is not None and (found["least_p"] or 0) <= LEVEL
    if not tests or found["p"] <= LEVEL or one["low"] > 0 or one["high"] < 0:
        return
    share = float((grid.values[0] != grid.values[1]).mean())
    # With one seed records are tested; else the interval over seeds and records has to leave out 0.
    error = (one["high"] - one["low"]) / (2 * 1.959964)
    visible = visible_share(one["records"], share, LEVEL) if found["test"] == "McNemar" else visible_mean(error)
    if visible:
        yield f"of true differences {unseen([visible], is_binary(np.unique(grid.values).tolist()))}"


def controls(work: Work) -> list[Report]:
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


def _averaged(reports: Mapping[int, Mapping[str, Any]], draws: Draws, miss: Callable[[str], None]) -> Report:
    """Average the reports of an arm, seed → report."""
    found: Report = {"metric": None, "conditions": {}, "path": None}
    if scored := {seed: one for seed, one in reports.items() if "conditions" in one}:
        names = next(iter(scored.values()))["conditions"]
        metric = found["metric"] = names[OWN]["score"]["metric"]
        answers = {seed: one["answers"] for seed, one in scored.items()}
        grid = _grid(answers, names, lambda answer, name: answer["conditions"][name]["metrics"][metric])
        if grid.left_out:
            miss(f"{grid.left_out} records have no score under some condition or seed of its controls and are left out")
        scores = dict(zip(names, grid.values, strict=True))
        for name, values in scores.items():
            apart = None if name == OWN else grid.estimate(values - scores[OWN], draws)[0]
            found["conditions"][name] = {**grid.estimate(values, draws)[0], "difference": apart}
    if answers := {seed: one["path"]["answers"] for seed, one in reports.items() if "path" in one}:
        # A record's answer meets a verdict in 0, 1 or 2 of its two injections.
        grid = _grid(answers, VERDICTS, lambda answer, kind: list(answer["follows"].values()).count(kind) / 2)
        shares = dict(zip(VERDICTS, grid.values, strict=True))
        shares["difference"] = shares["injected"] - shares["other"]
        found["path"] = {kind: grid.estimate(values, draws)[0] for kind, values in shares.items()}
    return found


def _grid(answers: Mapping[int, Sequence[Answer]], names: Iterable[str], value: Callable[[Answer, str], float]) -> Grid:
    """Line up what each record has under each name; answers: seed → a record each. They do not say a record's level."""

    def scored(own: Sequence[Answer], name: str) -> Column:
        return make_column([str(one["line"]) for one in own], [NO_LEVEL] * len(own), [value(one, name) for one in own])

    return line_up([{seed: scored(own, name) for seed, own in answers.items()} for name in names])
