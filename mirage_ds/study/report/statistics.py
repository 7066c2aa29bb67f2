"""Cells → matrices of scores, and means over seeds and records: intervals, paired tests, equivalence.

S seeds, N records, L levels, R resamples, G groups (the arms of a contrast, the conditions of a control). A matrix of
scores is (S, N); its columns stand level by level, and `sizes` says how many each level has.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from mirage_ds.analysis.controls.statistics import mcnemar
from mirage_ds.evaluate.scoring import RESAMPLES, is_binary
from mirage_ds.study.results import Cell, Results, Scores

# Kept draws: 1 byte a resample and record each, 40 MB for 10,000 × 4,000.
_MOST_KEPT = 3
# Resamples multiplied at a time: their counts take 8 bytes a record.
_CHUNK = 500
# From so many paired seeds on their differences are tested, up to the second number with every sign pattern.
LEAST_SEEDS, MOST_EXACT = 5, 16
FLIPS = 20_000
# Sums of the same numbers in another order differ in their last bits; bounds and p-values must not.
_DIGITS = 12
TOO_FEW = "too few seeds"
# A p above it leaves a difference undecided, whatever its interval says.
LEVEL = 0.05
# Of a record without a level, as in Scores.
NO_LEVEL = "?"
# A mean over seeds and records, as report.json has it; see `estimate`.
Estimate: TypeAlias = dict[str, Any]
# One cell's scores by one metric: level (str) and value (float64, finite) of N records, whose names are the index.
Column: TypeAlias = pd.DataFrame


class Draws(NamedTuple):
    """Which seeds and records each resample holds.

    The draws of a mix of levels are the same for everything that is measured on it, so what is compared is compared
    under the same draws, and no result depends on what was measured before it.
    """

    resamples: int = RESAMPLES
    seed: int = 0

    def seeds(self, count: int) -> np.ndarray:
        """Return (R, S) float64: the share of each of S seeds in each resample; rows sum to 1."""
        rng = np.random.default_rng([self.seed, 1, count])
        return _counts(rng, self.resamples, count) / count

    @lru_cache(maxsize=_MOST_KEPT)  # noqa: B019
    def records(self, sizes: tuple[int, ...]) -> np.ndarray:
        """Return (R, N) uint8: how often each record is in each resample; every level keeps its size."""
        rng = np.random.default_rng([self.seed, 2, *sizes])
        # A record that is drawn more than 255 times out of more than 255 does not happen.
        return np.concatenate([_counts(rng, self.resamples, size).astype(np.uint8) for size in sizes], axis=1)


def _counts(rng: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """Draw `count` of `count` with replacement, R times: (R, count), how often each was drawn."""
    parts = []
    for at in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - at)
        # All resamples of a chunk are counted at once, each in bins of its own.
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count))
    return np.concatenate(parts)


def estimate(values: np.ndarray, sizes: Sequence[int], draws: Draws) -> tuple[Estimate, list[Estimate]]:
    """Average a matrix, as a whole and level by level, with intervals of the hierarchical bootstrap.

    Seeds are resampled with replacement and, crossed with them, records within each level, since all seeds answer the
    same records. The bounds are percentiles of the means.

    Args:
        values: (S, N) with S, N ≥ 1; sizes: records of each of L levels, which sum to N.

    Returns:
        (overall, one a level), each an Estimate: {"mean": of S × N values, "low", "high": its 95 % interval, "low90",
        "high90": its 90 % interval, "seeds", "records": S and N, "resampled": what the interval is over}. That is
        "seeds and records", or "records" where there is only one seed; then it says nothing about another training run.
    """
    seeds, count = values.shape
    shares, drawn = draws.seeds(seeds), draws.records(tuple(sizes))
    sums = np.empty((draws.resamples, len(sizes)))
    columns = [slice(int(end) - size, int(end)) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    for at in range(0, draws.resamples, _CHUNK):
        part = slice(at, at + _CHUNK)
        for level, own in enumerate(columns):
            by_seed = drawn[part, own].astype(np.float64) @ values[:, own].T
            sums[part, level] = (by_seed * shares[part]).sum(1)
    resampled = "seeds and records" if seeds > 1 else "records"

    def made(mean: float, means: np.ndarray, records: int) -> Estimate:
        low, low90, high90, high = np.quantile(means, [0.025, 0.05, 0.95, 0.975])
        numbers = {"mean": mean, "low": low, "high": high, "low90": low90, "high90": high90}
        rounded = {name: round(float(one), _DIGITS) for name, one in numbers.items()}
        return {**rounded, "seeds": seeds, "records": records, "resampled": resampled}

    levels = [
        made(values[:, own].mean(), sums[:, level] / size, size)
        for level, (own, size) in enumerate(zip(columns, sizes, strict=True))
    ]
    return made(values.mean(), sums.sum(1) / count, count), levels


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the permutation test on S seeds' mean differences, whose signs are chance under the null.

    All 2^S sign patterns up to 16 seeds; above that 20,000 random ones and the observed one.
    """
    count = len(differences)
    if count <= MOST_EXACT:
        sums = np.zeros(1)
        for one in differences:
            sums = np.concatenate([sums + one, sums - one])
    else:
        signs = np.random.default_rng(seed).integers(2, size=(FLIPS, count)) * 2 - 1
        sums = np.append(signs @ np.asarray(differences, dtype=np.float64), sum(differences))
    far = abs(sum(differences)) - 1e-12 * max(1.0, sum(map(abs, differences)))
    return float((np.abs(sums) >= far).mean())


def equivalent(difference: Estimate, margin: float) -> bool:
    """Tell whether two one-sided tests at 5 % find the difference within ± margin."""
    return -margin < difference["low90"] and difference["high90"] < margin


def verdict(difference: Estimate, margin: float, p: float | None = None) -> str:
    """Say in a word what the intervals and the test say: higher, lower, equivalent, undecided.

    An interval from resampling a handful of seeds is narrower than it ought to be, so the exact test has to agree.
    """
    if p is None or p <= LEVEL:
        if difference["low"] > 0:
            return "higher"
        if difference["high"] < 0:
            return "lower"
    return "equivalent" if equivalent(difference, margin) else "undecided"


def compare(grid: "Grid", margin: float, draws: Draws) -> dict[str, Any]:
    """Compare the two groups of a grid, arm and base.

    Args:
        margin: a difference within ± this counts as none.

    Returns:
        difference: an Estimate of arm − base; by_level: level → the same; by_seed: {"seed", "difference": its mean}.
        test: "sign-flip" (over seeds, every pattern), "sign-flip, random" (20,000 patterns), "McNemar" (over records,
            one seed) or "none".
        p: of that test, two-sided; None without one: from two to four seeds none can reach 5 %, and McNemar's wants
            values of 0 and 1.
        least_p: the smallest p that the test can give with so many seeds; None for the others.
        equivalent: the 90 % interval lies inside ± margin, which is two one-sided tests at 5 %.
        verdict: "higher" or "lower" where the 95 % interval excludes 0 and p, if there is one, is at most 5 %; else
            "equivalent" or "undecided". A difference that is both significant and equivalent is "higher" or "lower"
            with `equivalent` set. Below five seeds TOO_FEW, and not equivalent: of two to four the interval is too
            narrow to say anything by, and one is two models, not two arms.
    """
    arm, base = grid.values
    overall, levels = grid.estimate(arm - base, draws)
    by_seed = [round(float(one), _DIGITS) for one in (arm - base).mean(1)]
    test, p, least = "none", None, None
    if len(by_seed) >= LEAST_SEEDS:
        exact = len(by_seed) <= MOST_EXACT
        test = "sign-flip" if exact else "sign-flip, random"
        p, least = sign_flip(by_seed), 2.0 ** (1 - len(by_seed)) if exact else 1 / (FLIPS + 1)
    elif len(by_seed) == 1 and is_binary(np.unique(grid.values)):
        test, p = "McNemar", mcnemar(arm[0].tolist(), base[0].tolist())
    few = len(by_seed) < LEAST_SEEDS
    return {
        "difference": overall,
        "by_level": levels,
        "by_seed": [{"seed": seed, "difference": one} for seed, one in zip(grid.seeds, by_seed, strict=True)],
        "test": test,
        "p": p,
        "least_p": least,
        "equivalent": equivalent(overall, margin) and not few,
        "verdict": TOO_FEW if few else verdict(overall, margin, p),
    }


class Misfit(ValueError):
    """Scores that cannot be put together; the message says why, as the end of a sentence. The report shows it."""


class Work:
    """What every part of the report reads, and the holes that it finds.

    Attributes:
        cells: arm → its cells, in the study's order and by seed.
        metrics: evaluation → its metrics, in the order of its first scored record; the first is the task's success.
        holes: {"arm", "seed", "evaluation", "problem"} of what is missing; None where it is about no single one.
    """

    def __init__(self, results: Results, draws: Draws):
        self.draws, self.holes = draws, list[dict[str, Any]]()
        self.cells: dict[str, list[Cell]] = {name: [] for name in results.arms}
        self.metrics: dict[str, list[str]] = {}
        for cell in sorted(results.cells, key=lambda cell: cell.seed):
            self.cells[cell.arm].append(cell)
        for cell in chain.from_iterable(self.cells.values()):
            if cell.problem or not cell.is_scored:
                self.miss(cell.arm, cell.seed, cell.problem or "it has no scores")
            for evaluation, scores in cell.scores.items():
                if scores.metrics:
                    self.metrics.setdefault(evaluation, list(scores.metrics))
        for problem in results.unseen:
            self.miss(None, None, problem)

    def miss(self, arm: str | None, seed: int | None, problem: str, evaluation: str | None = None) -> None:
        """Write down what is missing, and where."""
        self.holes.append({"arm": arm, "seed": seed, "evaluation": evaluation, "problem": problem})


def make_column(records: Sequence[str], levels: Sequence[str], values: Sequence[float]) -> Column:
    """Put the scores of N records together; those without a finite value are left out."""
    # As objects: pandas' own texts cannot hold half a surrogate pair, which a record's level may have.
    level = np.asarray(levels, object)
    found = pd.DataFrame({"level": level, "value": np.asarray(values, float)}, pd.Index(records, dtype=object))
    return found[np.isfinite(found["value"])]


def column(scores: Scores, metric: str | None, only: Sequence[str] = ()) -> Column:
    """Read one cell's scores by one metric.

    Args:
        only: levels that count; all if empty.
    """
    nothing = [math.nan] * len(scores.records)
    found = make_column(scores.records, scores.levels, scores.metrics.get(metric or "", nothing))
    return found[found["level"].isin(only)] if only else found


def level_key(level: str) -> tuple[int, float, str]:
    """Sort levels as numbers where they are numbers, the others behind them."""
    try:
        number = float(level)
    except ValueError:
        number = math.nan
    return (0, number, level) if math.isfinite(number) else (1, 0.0, level)


class Grid(NamedTuple):
    """Scores of G groups on the same seeds and records.

    Attributes:
        seeds: S.
        levels: name → how many records it has, of those that occur; they sum to N.
        values: (G, S, N), level by level.
        left_out: records that some cell has and another has not.
    """

    seeds: tuple[int, ...]
    levels: Mapping[str, int]
    values: np.ndarray
    left_out: int

    def estimate(self, values: np.ndarray, draws: Draws) -> tuple[Estimate, dict[str, Estimate]]:
        """Average values (S, N) as a whole, and level by level."""
        overall, levels = estimate(values, list(self.levels.values()), draws)
        return overall, dict(zip(self.levels, levels, strict=True))


def line_up(groups: Sequence[Mapping[int, Column]]) -> Grid:
    """Bring the groups to the seeds and records that all of them have.

    The order of the result depends on the names of seeds, levels and records alone, not on the order they came in.

    Args:
        groups: seed → its column, for each group. A record's level is that of the first column.

    Raises:
        Misfit: no common seed, or no record that all cells have.
    """
    seeds = sorted(set.intersection(*(set(group) for group in groups)))
    if not seeds:
        raise Misfit("they have no common seed with scores")
    columns = [group[seed] for group in groups for seed in seeds]
    shared = pd.concat([one["value"] for one in columns], axis=1, join="inner")
    if shared.empty:
        raise Misfit("they have no common record")
    level_of = columns[0]["level"].to_dict()
    records = sorted(shared.index, key=lambda name: (level_key(level_of[name]), name))
    return Grid(
        seeds=tuple(seeds),
        levels=Counter(level_of[name] for name in records),
        values=shared.loc[records].to_numpy().T.reshape(len(groups), len(seeds), len(records)),
        left_out=len(set().union(*(one.index for one in columns))) - len(records),
    )
