"""Contrasts of a study → differences with intervals, tests and verdicts, as plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mirage_ds.analysis.controls.statistics import holm
from mirage_ds.study.report.grid import Column, Grid, Misfit, column, line_up
from mirage_ds.study.report.statistics import Comparison, Draws, compare
from mirage_ds.study.results import Cell, Contrast, Results

Found = dict[str, Any]


def contrasts(
    results: Results,
    cells: Mapping[str, Sequence[Cell]],
    metrics: Mapping[str, Sequence[str]],
    draws: Draws,
    holes: list[Found],
) -> tuple[Found | None, list[Found]]:
    """Compare what the study wants compared.

    Args:
        cells: arm → its cells, one a seed; metrics: evaluation → its metrics.
        holes: a contrast that cannot be made is added here.

    Returns:
        (primary, others). Each has {"arm", "base", "evaluation", "levels", "metric", "problem"} and, where "problem" is
        None, what `_compared` and `_families` say. "p_holm" is adjusted among the others; the primary has none.
    """
    primary = _contrast(results.primary, results, cells, metrics, draws, holes) if results.primary else None
    others = [
        _contrast(one, results, cells, metrics, draws, holes)
        for one in dict.fromkeys(_key(each) for each in results.contrasts)
        if results.primary is None or one != _key(results.primary)
    ]
    tested = [one for one in others if one.get("p") is not None]
    for one, adjusted in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = adjusted
    return primary, others


def _key(contrast: Contrast) -> Contrast:
    """Return the same contrast with its levels as a tuple of texts, so that two can be told apart."""
    levels = tuple(str(level) for level in contrast.levels)
    return Contrast(contrast.arm, contrast.base, contrast.evaluation, levels, contrast.metric)


def _contrast(
    contrast: Contrast,
    results: Results,
    cells: Mapping[str, Sequence[Cell]],
    metrics: Mapping[str, Sequence[str]],
    draws: Draws,
    holes: list[Found],
) -> Found:
    first = next(iter(metrics.get(contrast.evaluation, ())), None)
    found: Found = {
        "arm": contrast.arm,
        "base": contrast.base,
        "evaluation": contrast.evaluation,
        "levels": [str(level) for level in contrast.levels],
        "metric": contrast.metric or first,
        "problem": None,
    }
    try:
        pair = [_columns(name, found, cells) for name in (contrast.arm, contrast.base)]
        grid = line_up(pair)
    except Misfit as error:
        found["problem"] = f"contrast {contrast.arm} − {contrast.base}: {error}"
        holes.append({"arm": None, "seed": None, "evaluation": contrast.evaluation, "problem": found["problem"]})
        return found
    compared = compare(grid.values[0], grid.values[1], grid.sizes, results.margin, draws)
    found.update(_compared(compared, grid))
    found["families"] = _families(found, [cell for name in (contrast.arm, contrast.base) for cell in cells[name]])
    found["notes"] = _notes(found, grid, [set(one) for one in pair])
    found["steps"] = _steps(contrast, cells, grid.seeds)
    if len({tuple(steps) for steps in found["steps"].values()}) > 1:
        found["notes"].append("not step-matched")
    return found


def _columns(name: str, found: Found, cells: Mapping[str, Sequence[Cell]]) -> dict[int, Column]:
    """Read one arm's scores, seed by seed."""
    if name not in cells:
        raise Misfit(f"the study has no arm {name!r}")
    columns = {}
    for cell in cells[name]:
        scores = cell.scores.get(found["evaluation"])
        one = column(scores, found["metric"], found["levels"]) if scores else None
        if one is not None and one.records:
            columns[cell.seed] = one
    if not columns:
        at = f" at levels {', '.join(found['levels'])}" if found["levels"] else ""
        by = f" by {found['metric']}" if found["metric"] else ""
        raise Misfit(f"no cell of {name!r} has scores{by} in evaluation {found['evaluation']!r}{at}")
    return columns


def _compared(compared: Comparison, grid: Grid) -> Found:
    """Write a comparison as a dict.

    "difference" and "by_level" are Estimates, "by_seed" pairs seed and mean difference, "means" are those of arm and
    base over the same seeds and records; the rest as in Comparison.
    """
    return {
        "difference": asdict(compared.difference),
        "by_level": {name: asdict(one) for name, one in zip(grid.levels, compared.levels, strict=True)},
        "by_seed": [{"seed": seed, "difference": one} for seed, one in zip(grid.seeds, compared.by_seed, strict=True)],
        "means": {"arm": float(grid.values[0].mean()), "base": float(grid.values[1].mean())},
        "test": compared.test,
        "p": compared.p,
        "p_holm": None,
        "least_p": compared.least_p,
        "verdict": compared.verdict,
        "equivalent": compared.equivalent,
    }


def _families(found: Found, cells: Sequence[Cell]) -> list[Found]:
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


def _kinship(families: Sequence[Found], count: int) -> list[str]:
    """Say what seeds share; `count` is the number of all that were compared."""
    if not families:
        return []
    if len(families) == 1 and len(families[0]["seeds"]) == count:
        return [f"all seeds share {_and(families[0]['runs'])}: the interval says nothing about another one"]
    groups = "; ".join(
        f"seeds {', '.join(map(str, one['seeds']))} share {_and(one['runs'])} ({one['difference']:+.3f})"
        for one in families
    )
    alone = count - sum(len(one["seeds"]) for one in families)
    groups += f"; {alone} share nothing" if alone else ""
    return [f"{groups}: such seeds are not independent, and the interval and the test take them as if they were"]


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)


def _notes(found: Found, grid: Grid, seeds: Sequence[set[int]]) -> list[str]:
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
    return notes


def _steps(contrast: Contrast, cells: Mapping[str, Sequence[Cell]], seeds: Sequence[int]) -> dict[str, list[int]]:
    """Return the optimizer steps of the chains that were compared, seed by seed."""
    return {
        side: [sum(stage.steps for stage in cell.stages) for cell in cells[name] if cell.seed in seeds]
        for side, name in (("arm", contrast.arm), ("base", contrast.base))
    }
