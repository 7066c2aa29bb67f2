"""Cells → matrices of scores, rows and columns lined up by seed and by record.

S seeds, N records, G groups (the arms of a contrast, the conditions of a control).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mirage_ds.study.results import Scored


class Misfit(Exception):
    """Scores that cannot be put together; the message says why, as the end of a sentence. The report shows it."""


class Column(NamedTuple):
    """One cell's scores in one evaluation, by one metric.

    Attributes:
        records: names, each once; levels: of the records; values: (N,) float64, finite.
        faults: what was left out, as ends of sentences.
    """

    records: tuple[str, ...]
    levels: tuple[str, ...]
    values: np.ndarray
    faults: tuple[str, ...] = ()


def column(scores: Iterable[Scored], metric: str, only: Sequence[str] = ()) -> Column:
    """Read one cell's scores; a record without a finite value is left out, one that stands there twice counts once.

    Args:
        only: levels that count; all if empty.
    """
    found: dict[str, tuple[str, float]] = {}
    twice = empty = 0
    wanted = {str(level) for level in only}
    for one in scores:
        value = one.metrics.get(metric)
        if wanted and str(one.level) not in wanted:
            continue
        if value is None or not math.isfinite(value):
            empty += 1
        elif one.record in found:
            twice += 1
        else:
            found[one.record] = str(one.level), float(value)
    faults = [f"{empty} records have no number for {metric!r} and are left out"] if empty else []
    faults += [f"{twice} records stand there twice, and the first of each counts"] if twice else []
    levels, values = zip(*found.values(), strict=True) if found else ((), ())
    return Column(tuple(found), levels, np.asarray(values, dtype=np.float64), tuple(faults))


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
        seeds: S; levels, sizes: the levels that occur and how many records each has; records: N, level by level.
        values: (G, S, N).
        left_out: records that some cell has and another has not.
    """

    seeds: tuple[int, ...]
    levels: tuple[str, ...]
    sizes: tuple[int, ...]
    records: tuple[str, ...]
    values: np.ndarray
    left_out: int


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
    shared = set(columns[0].records).intersection(*(one.records for one in columns[1:]))
    if not shared:
        raise Misfit("they have no common record")
    every = set().union(*(one.records for one in columns))
    level_of = dict(zip(columns[0].records, columns[0].levels, strict=True))
    records = sorted(shared, key=lambda name: (level_key(level_of[name]), name))
    rows: dict[tuple[str, ...], np.ndarray] = {}
    values = []
    for one in columns:
        # Nearly always all cells list their records alike, so the order is worked out once.
        if one.records not in rows:
            at = {name: i for i, name in enumerate(one.records)}
            rows[one.records] = np.asarray([at[name] for name in records])
        values.append(one.values[rows[one.records]])
    levels = list(dict.fromkeys(level_of[name] for name in records))
    counts = [level_of[name] for name in records]
    return Grid(
        tuple(seeds),
        tuple(levels),
        tuple(counts.count(level) for level in levels),
        tuple(records),
        np.stack(values).reshape(len(groups), len(seeds), len(records)),
        len(every) - len(shared),
    )
