"""Cells → matrices of scores, rows and columns lined up by seed and by record.

S seeds, N records, G groups (the arms of a contrast, the conditions of a control).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from mirage_ds.study.report.statistics import Draws
from mirage_ds.study.results import Cell, Scores

# Of a record without a level, as in Scores.
NO_LEVEL = "?"


class Misfit(ValueError):
    """Scores that cannot be put together; the message says why, as the end of a sentence. The report shows it."""


@dataclass
class Work:
    """What every part of the report reads, and the holes that it finds.

    Attributes:
        cells: arm → its cells, one a seed, in their order.
        metrics: evaluation → its metrics; the first is the task's success.
        holes: {"arm", "seed", "evaluation", "problem"} of what is missing; None where it is about no single one.
    """

    draws: Draws
    cells: dict[str, list[Cell]] = field(default_factory=dict)
    metrics: dict[str, list[str]] = field(default_factory=dict)
    holes: list[dict[str, Any]] = field(default_factory=list)

    def miss(self, arm: str | None, seed: int | None, problem: str, evaluation: str | None = None) -> None:
        """Write down what is missing, and where."""
        self.holes.append({"arm": arm, "seed": seed, "evaluation": evaluation, "problem": problem})


# One cell's scores by one metric: level (str) and value (float64, finite) of N records, whose names are the index.
Column: TypeAlias = pd.DataFrame


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
