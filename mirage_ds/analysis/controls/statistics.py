"""Paired differences between two conditions on the same records: intervals and tests. N records."""

from collections.abc import Mapping, Sequence

from mirage_ds.evaluate.scoring import RESAMPLES, bootstrap, is_binary  # noqa: F401  # study reports resample as often


def mcnemar(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p of the exact McNemar test: are the N paired outcomes, each 0 or 1, equally often 1?

    Only records on which the two differ count; under the null either is the better one with probability ½.
    """
    wins = sum(a > b for a, b in zip(one, other, strict=True))
    losses = sum(a < b for a, b in zip(one, other, strict=True))
    count, ways, tail = wins + losses, 1, 0
    for i in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (count - i) // (i + 1)
    return min(1.0, 2 * tail / 2**count)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for being several (Holm 1979), in the order given."""
    adjusted, least = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def difference(values: Sequence[float], base: Sequence[float], seed: int) -> dict[str, float | None]:
    """Compare N records' values with those of the same records under another condition.

    Returns:
        {"mean", "low", "high"} of the records' differences, with a 95 % bootstrap interval, and "p": exact McNemar
        where all values are 0 or 1, else None.
    """
    apart = [float(a) - float(b) for a, b in zip(values, base, strict=True)]
    low, high = bootstrap(apart, seed)
    p = mcnemar(values, base) if is_binary([*values, *base]) else None
    return {"mean": sum(apart) / len(apart), "low": low, "high": high, "p": p}


def differences(
    values: Mapping[str, Sequence[float]], base: Sequence[float], seed: int
) -> dict[str, dict[str, float | None]]:
    """Compare several conditions with one; "p_holm" are their p-values adjusted together."""
    found = {name: difference(own, base, seed) for name, own in values.items()}
    tested = {name: one["p"] for name, one in found.items() if one["p"] is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: {**one, "p_holm": adjusted.get(name)} for name, one in found.items()}
