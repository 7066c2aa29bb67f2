"""Results in one sentence: what was found, how sure, on how many records, and what could not be seen with so few."""

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_ds.analysis.controls.statistics import POWER, differs, p_of

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
