"""Advantages beside a slow loop: an answer's reward over the mean of its group, in units of a spread."""

from __future__ import annotations

import statistics
from math import isnan, nan

import pytest
import torch

from mirage_ds.rl.objective import Scale, advantages

REWARDS = [1.0, 0.0, nan, 0.5, 2.0, 2.0, 2.0, nan, nan, 0.25, -1.0, 4.0]
GROUPS = [0, 0, 0, 0, 2, 2, 2, 1, 1, 3, 0, 2]


def slow(at: int, scale: Scale) -> float:
    """The advantage of one answer; a spread is that of a sample (n − 1), as TRL has it."""
    mine = [r for r, group in zip(REWARDS, GROUPS, strict=True) if group == GROUPS[at] and not isnan(r)]
    if isnan(REWARDS[at]):
        return 0.0
    # The same numbers for all answers, in the batch's case.
    of = mine if scale == "group" else [r for r in REWARDS if not isnan(r)]
    unit = 1.0 if scale == "none" else (statistics.stdev(of) if len(of) > 1 else 0.0) + 1e-4
    return (REWARDS[at] - statistics.fmean(mine)) / unit


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_the_slow_loops(scale: Scale) -> None:
    made = advantages(torch.tensor(REWARDS), torch.tensor(GROUPS), scale)
    wanted = [slow(at, scale) for at in range(len(REWARDS))]
    assert made.values.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    # Where all are rewarded alike, or nobody is, nothing is learnt.
    assert made.values[[2, 7, 8, 9]].tolist() == [0, 0, 0, 0]
