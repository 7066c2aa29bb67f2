"""What a study compares: contrasts between arms, and the controls of each. S seeds, N records."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.controls.statistics import holm, unseen, visible_mean, visible_share
from mirage_ds.errors import reason
from mirage_ds.evaluate.scoring import is_binary
from mirage_ds.study.report.statistics import (
    LEAST_SEEDS,
    LEVEL,
    NO_LEVEL,
    Column,
    Draws,
    Grid,
    Misfit,
    Work,
    column,
    compare,
    line_up,
    make_column,
)
from mirage_ds.study.results import Cell
from mirage_ds.study.spec import ContrastSpec, ReportSpec

Report = dict[str, Any]
# One record's answers, as `mirage-ds controls` writes them.
Answer = Mapping[str, Any]
OWN = "own"


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
    found |= compare(grid, margin, work.draws)
    found["means"] = {side: float(values.mean()) for side, values in zip(sides, grid.values, strict=True)}
    found["p_holm"] = None
    found["families"] = _families(found, [cell for name in sides.values() for cell in work.cells[name]])
    found["steps"] = {
        side: [sum(stage.steps for stage in cell.stages) for cell in work.cells[name] if cell.seed in grid.seeds]
        for side, name in sides.items()
    }
    found["notes"] = _notes(found, grid, [set(one) for one in pair])
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


def _kinship(families: Sequence[Report], count: int) -> str:
    """Say what seeds share, if they do; `count` is the number of all that were compared."""
    if len(families) == 1 and len(families[0]["seeds"]) == count:
        return f"all seeds share {' and '.join(families[0]['runs'])}: the interval says nothing about another one"
    groups = [
        f"seeds {', '.join(map(str, one['seeds']))} share {' and '.join(one['runs'])} ({one['difference']:+.3f})"
        for one in families
    ]
    if alone := count - sum(len(one["seeds"]) for one in families):
        groups.append(f"{alone} share nothing")
    why = "such seeds are not independent, and the interval and the test take them as if they were"
    return f"{'; '.join(groups)}: {why}" if families else ""


def _notes(found: Report, grid: Grid, seeds: Sequence[set[int]]) -> list[str]:
    """Say what the numbers alone would hide."""
    count, least, alone = len(grid.seeds), found["least_p"] or 0.0, len(set.union(*seeds)) - len(grid.seeds)
    kin, blind = _kinship(found["families"], count), _blind(found, grid)
    alike = (grid.values[0] == grid.values[1]).all()
    notes = [
        (alone, f"{alone} seeds have scores in one of the two arms only and are left out"),
        (grid.left_out, f"{grid.left_out} records do not have scores in every cell and are left out"),
        (count == 1, "one seed: the interval is over records alone and says nothing about another training run"),
        (1 < count < LEAST_SEEDS, f"{count} seeds: the interval is too narrow, and there is no test"),
        (least > LEVEL, f"with {count} seeds p cannot fall below {least:.4f}"),
        (kin, kin),
        (alike, "the two do not differ in any record: the interval has no width and says nothing about others"),
        (blind, blind),
        (len({tuple(steps) for steps in found["steps"].values()}) > 1, "not step-matched"),
    ]
    return [text for holds, text in notes if holds]


def _blind(found: Report, grid: Grid) -> str:
    """Say, where no difference was found and the test can find one, which ones were too small for it."""
    one, tests = found["difference"], found["p"] is not None and (found["least_p"] or 0) <= LEVEL
    if not tests or found["p"] <= LEVEL or one["low"] > 0 or one["high"] < 0:
        return ""
    share = float((grid.values[0] != grid.values[1]).mean())
    # With one seed records are tested; else the interval over seeds and records has to leave out 0.
    error = (one["high"] - one["low"]) / (2 * 1.959964)
    visible = visible_share(one["records"], share, LEVEL) if found["test"] == "McNemar" else visible_mean(error)
    return f"of true differences {unseen([visible], is_binary(np.unique(grid.values).tolist()))}" if visible else ""


def controls(work: Work) -> list[Report]:
    """Average the controls of each arm and evaluation over the seeds that have them.

    Returns:
        One entry an arm and evaluation: {"arm", "evaluation", "metric", "conditions", "path", "latents", "probe"}.
        "latents": measure of analysis.alike → what `_over_seeds` returns; "probe": "question (boards)" → the same of
        its "accuracy" and "chance"; {} where no cell has any. "conditions": name →
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
    seen = [one["latents"] for one in reports.values() if one.get("latents")]
    read = [one["probe"] for one in reports.values() if one.get("probe")]
    found: Report = {"metric": None, "conditions": {}, "path": None, "latents": _over_seeds(seen), "probe": {}}
    for name in dict(*read[:1]):
        both = [{key: one[name][key] for key in ("accuracy", "chance")} for one in read if name in one]
        found["probe"][name] = _over_seeds(both)
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


def _over_seeds(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return each number's mean over seeds, the least and the most of them, and how many seeds have it."""
    each = {name: [one[name] for one in found if name in one] for name in dict.fromkeys(chain.from_iterable(found))}
    return {
        name: {"mean": fmean(own), "least": min(own), "most": max(own), "seeds": len(own)} for name, own in each.items()
    }


def _grid(answers: Mapping[int, Sequence[Answer]], names: Iterable[str], value: Callable[[Answer, str], float]) -> Grid:
    """Line up what each record has under each name; answers: seed → a record each. They do not say a record's level."""

    def scored(own: Sequence[Answer], name: str) -> Column:
        return make_column([str(one["line"]) for one in own], [NO_LEVEL] * len(own), [value(one, name) for one in own])

    return line_up([{seed: scored(own, name) for seed, own in answers.items()} for name in names])
