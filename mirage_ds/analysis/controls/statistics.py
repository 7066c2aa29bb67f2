"""Paired differences between two conditions on the same records: intervals and tests. N records."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mirage_ds.evaluate.scoring import wilson

RESAMPLES = 10_000
# Resamples drawn at a time: their indices take 8 bytes a record.
_CHUNK = 500


def bootstrap(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of N records' values, by resampling records.

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("no value to resample")
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    sizes = [min(_CHUNK, resamples - at) for at in range(0, resamples, _CHUNK)]
    means = [array[rng.integers(len(array), size=(size, len(array)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


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


def is_binary(values: Iterable[float]) -> bool:
    """Tell whether all values are 0 or 1."""
    return {float(value) for value in values} <= {0.0, 1.0}


def average(values: Sequence[float], seed: int) -> dict[str, float]:
    """Average N records' values.

    Returns:
        {"mean", "low", "high"}: the 95 % interval is Wilson's where all values are 0 or 1, else by bootstrap.
    """
    low, high = wilson(sum(values), len(values)) if is_binary(values) else bootstrap(values, seed)
    return {"mean": float(sum(values) / len(values)), "low": low, "high": high}


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
