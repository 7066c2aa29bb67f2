"""Means over seeds and records: intervals, paired tests, equivalence.

S seeds, N records, L levels, R resamples. A matrix of scores is (S, N); its columns stand level by level, and `sizes`
says how many each level has.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mirage_ds.analysis.controls.statistics import RESAMPLES, is_binary, mcnemar

# Resamples multiplied at a time: their counts take 8 bytes a record.
_CHUNK = 500
# Kept draws: 1 byte a resample and record each, 40 MB for 10,000 × 4,000.
_MOST_KEPT = 3
# Resamples multiplied at a time: their counts take 8 bytes a record.
_CHUNK = 500
# From so many paired seeds on their differences are tested, up to the second number with every sign pattern.
LEAST_SEEDS, MOST_EXACT = 5, 16
FLIPS = 20_000
# Sums of the same numbers in another order differ in their last bits; bounds and p-values must not.
_DIGITS = 12


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


# A mean over seeds and records, as report.json has it; see `estimate`.
Estimate: TypeAlias = dict[str, Any]


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


TOO_FEW = "too few seeds"
# A p above it leaves a difference undecided, whatever its interval says.
LEVEL = 0.05


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


def compare(arm: np.ndarray, base: np.ndarray, sizes: Sequence[int], margin: float, draws: Draws) -> dict[str, Any]:
    """Compare two matrices (S, N) of the same seeds and records.

    Args:
        sizes: records of each level; margin: a difference within ± this counts as none.

    Returns:
        difference: an Estimate of arm − base; by_level: the same for each level; by_seed: mean difference of each seed.
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
    apart = arm - base
    overall, levels = estimate(apart, sizes, draws)
    by_seed = [round(float(one), _DIGITS) for one in apart.mean(1)]
    test, p, least = "none", None, None
    if len(by_seed) >= LEAST_SEEDS:
        exact = len(by_seed) <= MOST_EXACT
        test = "sign-flip" if exact else "sign-flip, random"
        p, least = sign_flip(by_seed), 2.0 ** (1 - len(by_seed)) if exact else 1 / (FLIPS + 1)
    elif len(by_seed) == 1 and is_binary(np.unique(np.concatenate([arm, base]))):
        test, p = "McNemar", mcnemar(arm[0].tolist(), base[0].tolist())
    few = len(by_seed) < LEAST_SEEDS
    return {
        "difference": overall,
        "by_level": levels,
        "by_seed": by_seed,
        "test": test,
        "p": p,
        "least_p": least,
        "equivalent": equivalent(overall, margin) and not few,
        "verdict": TOO_FEW if few else verdict(overall, margin, p),
    }
