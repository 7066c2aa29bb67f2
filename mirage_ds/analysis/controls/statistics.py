"""Paired differences between two conditions on the same records: intervals, tests, what a test can see. N records."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist, pstdev
from typing import Any

import numpy as np

from mirage_ds.evaluate.scoring import bootstrap, is_binary

# A difference that is found in so many of all samples would have shown.
POWER = 0.8
# Chances below it are left out of sums.
_NEVER = 1e-10


def mcnemar(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p of the exact McNemar test: are the N paired outcomes, each 0 or 1, equally often 1?

    Only records on which the two differ count; under the null either is the better one with probability ½.
    """
    wins = sum(a > b for a, b in zip(one, other, strict=True))
    losses = sum(a < b for a, b in zip(one, other, strict=True))
    count = wins + losses
    tail = sum(math.comb(count, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for being several (Holm 1979), in the order given."""
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.sort(p) * np.arange(len(p), 0, -1)))
    return [float(one) for one in adjusted]


def binomial(count: int, share: float) -> np.ndarray:
    """Return the chances of 0 to `count` hits, (count + 1,) float64."""
    hits = np.arange(count + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    share = min(max(share, 1e-300), 1 - 1e-16)
    ways = logs[-1] - logs - logs[::-1]
    return np.asarray(np.exp(ways + hits * math.log(share) + (count - hits) * math.log1p(-share)))


@lru_cache(maxsize=1 << 16)
def _wins_needed(count: int, alpha: float) -> int:
    """Return how many of `count` records that differ one side must win for a p of at most alpha."""
    p = 2 * np.cumsum(binomial(count, 0.5)[::-1])
    return count + 1 - int((p <= alpha).sum())


def mcnemar_power(count: int, discordant: float, apart: float, alpha: float) -> float:
    """Return how often the exact McNemar test finds a true difference between two shares.

    The unconditional power (Duffy, Biometrics 40, 1984; in SAS/STAT: PROC POWER, PAIREDFREQ, DIST=EXACT_COND): over
    every number of records that differ, its chance times the chance that the test then rejects.

    Args:
        count: N; discordant: the share of records, in truth, on which the two differ.
        apart: the difference, 0 to `discordant`; alpha: of the test.
    """
    found = 0.0
    for differ, chance in enumerate(binomial(count, discordant)):
        if chance > _NEVER:
            wins, needed = binomial(differ, (1 + apart / discordant) / 2), _wins_needed(differ, alpha)
            found += float(chance * (wins[needed:].sum() + wins[: differ - needed + 1].sum()))
    return found


def least(power: Callable[[float], float], most: float) -> float | None:
    """Return the smallest difference, up to `most`, that is found with POWER; None where not even `most` is.

    Args:
        power: of a difference; it does not fall.
    """
    if most <= 0 or power(most) < POWER:
        return None
    steps = 1 << 13
    return most * (1 + bisect_left(range(1, steps), POWER, key=lambda step: power(most * step / steps))) / steps


def visible_share(count: int, discordant: float, alpha: float) -> float | None:
    """Return the smallest true difference of two shares that the exact McNemar test finds with POWER.

    Args:
        discordant: the share of N records on which the two differ, as observed. Of a larger difference it is that
            difference, all of it in one direction, which is the case that shows soonest.
    """
    return least(lambda apart: mcnemar_power(count, max(discordant, apart), apart, alpha), 1.0)


def visible_lift(count: int, chance: float) -> float | None:
    """Return by how much a share must be above `chance`, in truth, for Wilson's 95 % interval to show it with POWER.

    The interval leaves out `chance` where the score test rejects it at 5 %; the power is the binomial's own.

    Args:
        count: of what the share is of.
    """
    needed = math.floor(count * chance + NormalDist().inv_cdf(0.975) * math.sqrt(count * chance * (1 - chance))) + 1
    return least(lambda lift: float(binomial(count, chance + lift)[needed:].sum()), 1 - chance)


def visible_mean(error: float) -> float:
    """Return the smallest true mean whose 95 % interval leaves out 0 with POWER; 0 without an error.

    (z(0.975) + z(POWER)) · error, the normal approximation (Chow, Shao and Wang, Sample Size Calculations in Clinical
    Research, 2008, section 3.1).

    Args:
        error: standard error of the mean.
    """
    return (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(POWER)) * error


def difference(values: Sequence[float], base: Sequence[float], seed: int, tests: int = 1) -> dict[str, float | None]:
    """Compare N records' values with those of the same records under another condition.

    Args:
        tests: how many such comparisons are adjusted together.

    Returns:
        {"mean", "low", "high"} of the records' differences, with a 95 % bootstrap interval, and "p": exact McNemar
        where all values are 0 or 1, else None. "visible": the smallest difference that would show with POWER, by the
        rule of `differs`, at the strictest level of Holm's; None where none would. It is 0 where numbers that are not
        all 0 or 1 differ by the same in every record.
    """
    apart = [float(a) - float(b) for a, b in zip(values, base, strict=True)]
    low, high = bootstrap(apart, seed)
    found = {"mean": sum(apart) / len(apart), "low": low, "high": high}
    if not is_binary([*values, *base]):
        return {**found, "p": None, "visible": visible_mean(pstdev(apart) / math.sqrt(len(apart)))}
    discordant = sum(map(bool, apart)) / len(apart)
    visible = visible_share(len(apart), discordant, 0.05 / tests)
    return {**found, "p": mcnemar(values, base), "visible": visible}


def p_of(one: Mapping[str, float | None]) -> float | None:
    """Return the p of a difference, adjusted where there are several; None where there is none."""
    return one["p"] if one.get("p_holm") is None else one["p_holm"]


def differs(one: Mapping[str, float | None]) -> bool:
    """Tell whether a difference was found: its p, adjusted where there are several, is at most 5 %.

    Where there is no p: its 95 % interval leaves out 0.
    """
    p = p_of(one)
    low, high = one["low"] or 0.0, one["high"] or 0.0
    return (low > 0 or high < 0) if p is None else p <= 0.05


def differences(
    values: Mapping[str, Sequence[float]], base: Sequence[float], seed: int
) -> dict[str, dict[str, float | None]]:
    """Compare several conditions with one; "p_holm" are their p-values adjusted together."""
    found = {name: difference(own, base, seed, len(values)) for name, own in values.items()}
    tested = {name: one["p"] for name, one in found.items() if one["p"] is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: {**one, "p_holm": adjusted.get(name)} for name, one in found.items()}


# How often a difference of the size that is told, or a smaller one, is missed.
MISSED = f"would be missed more than 1 time in {1 / (1 - POWER):.0f}"


def amount(value: float, points: bool, sign: str = "") -> str:
    """Write a difference: of shares in points, of other numbers as it is."""
    return f"{100 * value:{sign}.1f} points" if points else f"{value:{sign}.3g}"


def sure(one: Mapping[str, Any], points: bool) -> str:
    """Write a difference with its interval, and its p where there is one, in brackets."""
    low, high = (f"{100 * one[key]:+.1f}" if points else f"{one[key]:+.3g}" for key in ("low", "high"))
    p = p_of(one)
    tested = "" if p is None else ", p < 0.0001" if p < 1e-4 else f", p = {p:.4f}"
    return f"({amount(one['mean'], points, '+')}, 95 % interval {low} to {high}{tested})"


def unseen(visible: Sequence[float | None], points: bool) -> str:
    """Say which differences could not have been seen, behind "no difference is found …, where".

    Args:
        visible: see statistics.difference; of several comparisons each one's.
    """
    known = sorted(one for one in visible if one is not None)
    sizes = list(dict.fromkeys(amount(one, points) for one in known if one))
    if not sizes:
        return "no record differs at all" if known else "with so few records none of any size could show"
    if len(sizes) > 1:
        return f"one below {sizes[0].removesuffix(' points')} to {sizes[-1]}, by comparison, {MISSED}"
    return f"one below {sizes[0]} {MISSED}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Write names one after the other, the last behind an "and"."""
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def sentence(found: Mapping[str, Mapping[str, Any]], base: str, records: int, metric: str) -> str:
    """Say what the comparisons of several conditions with one came to.

    Args:
        found: condition → what statistics.differences returns; at least one.
        base: the condition that they are compared with.
    """
    points = next(iter(found.values()))["p"] is not None
    parts = []
    for way, sign in (("lower", -1), ("higher", 1)):
        names = [
            f"{name} {sure(one, points)}" for name, one in found.items() if differs(one) and one["mean"] * sign > 0
        ]
        if names:
            parts.append(f"{metric} is {way} with {listed(names)} than with {base}")
    same = {name: one["visible"] for name, one in found.items() if not differs(one)}
    if same:
        blind = unseen(list(same.values()), points)
        parts.append(f"no difference of {metric} is found between {base} and {listed(list(same), 'or')}, where {blind}")
    return f"On {records:,} records: {'; '.join(parts)}."
