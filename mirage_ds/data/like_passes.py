"""Rows that need many passes of the forward, brought together into few micro-steps: integers alone.

A micro-step goes through as many passes as the row that needs most of them, on every rank. R rows of an optimizer step.
"""

from itertools import chain

import numpy as np

Bins = list[list[int]]

# A bound on the time of a plan: so many rows are tried for each row of the step.
TRIES = 4


def bring_together(bins: Bins, sizes: np.ndarray, limit: int, width: int, passes: np.ndarray) -> Bins:
    """Exchange rows of like lengths until each micro-step has rows of more passes than the next one.

    Args:
        bins: of rows, `width` a micro-step.
        sizes: (2, R) tokens and patches of each row; `limit`: of either, what a bin holds.
        passes: (R,) what the passes of each row cost, in the unit of tokens.

    Returns:
        The bins with the rows exchanged, or as they were where that costs less.
    """
    if len(bins) == width or len(set(passes.tolist())) == 1:
        return bins
    bin_of = np.empty(len(passes), dtype=np.int64)
    for number, one in enumerate(bins):
        bin_of[one] = number
    sums = np.stack([sizes[:, one].sum(axis=1) for one in bins], axis=1)
    many = np.argsort(-passes, kind="stable")[: np.count_nonzero(passes > passes.min())]
    budget = TRIES * len(passes)
    for first in range(0, len(bins) - width, width):
        micro = bin_of // width == first // width
        for comes in many[bin_of[many] >= first + width][:budget]:
            budget -= 1
            fewer = np.flatnonzero(micro & (passes < passes[comes]))
            if not len(fewer):
                break
            gain = sizes[:, [comes]] - sizes[:, fewer]
            here, there = sums[:, bin_of[fewer]] + gain, sums[:, [bin_of[comes]]] - gain
            uneven = np.abs(gain[0])
            fits = (np.maximum(here, there) <= limit).all(axis=0) & (uneven <= passes[comes] - passes[fewer])
            place = int(np.where(fits, uneven, limit + 1).argmin())
            if fits[place]:
                goes = fewer[place]
                sums[:, bin_of[goes]] += gain[:, place]
                sums[:, bin_of[comes]] -= gain[:, place]
                bin_of[[goes, comes]] = bin_of[[comes, goes]]
                micro[[goes, comes]] = False, True
    together: Bins = [np.flatnonzero(bin_of == number).tolist() for number in range(len(bins))]
    return min(bins, together, key=lambda one: _cost(one, sizes[0], width, passes))


def _cost(bins: Bins, tokens: np.ndarray, width: int, passes: np.ndarray) -> int:
    """What the micro-steps take: the fullest bin of each, and the row of most passes."""
    micros = [bins[at : at + width] for at in range(0, len(bins), width)]
    return sum(
        max(int(tokens[one].sum()) for one in micro) + int(passes[list(chain(*micro))].max(initial=0))
        for micro in micros
    )
