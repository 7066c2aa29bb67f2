"""Packing: which rows an optimizer step has, and on which rank and micro-step each lies.

All of it is integer arithmetic on row lengths, the same on every rank without talking to the others.

B rows an optimizer step, W ranks, G micro-steps of the step.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain

import numpy as np

from mirage_ds.data.like_passes import Bins, bring_together
from mirage_ds.errors import UserError

# _fewest_bins counts rows down to a 17th of a bin; smaller ones fill the gaps that others leave.
MOST_OF_A_SIZE = 16
# Bins are even where ranks wait for less than one part in so many.
EVEN = 1000
# So many pairs of bins are looked at for an exchange, and one more for every 16 rows: a bound on the time of a plan.
TRIES = 256
# The fullest bin looks for a better one among so many of the emptiest.
EXCHANGE_WITH = 16
# A pass of the forward costs as much as so many tokens, if it is of few tokens itself: it reads every weight. The 7B on
# an H100: 6 ms, where 8,192 tokens take 0.9 s. Under ZeRO-3 without kept weights it is more.
PASS_TOKENS = 64


@dataclass(frozen=True)
class StepPlan:
    """The rows of one optimizer step and where each one runs.

    Attributes:
        step: optimizer step, from 0.
        bins: bins[micro-step][rank] = row indices, perhaps none.
    """

    step: int
    bins: list[Bins]

    @property
    def micro_steps(self) -> int:
        """G: micro-steps of this step, the same on every rank."""
        return len(self.bins)

    @property
    def rows(self) -> list[int]:
        """All rows of the step."""
        return [row for micro in self.bins for rank in micro for row in rank]


def total_steps(rows: int, rows_per_step: int, epochs: float, max_steps: int | None = None, each: int = 1) -> int:
    """Optimizer steps of a run, `each` on so many rows: enough that every row is seen `epochs` times.

    The step that crosses the last epoch's end takes its remaining rows from the beginning of the next one, so that
    every step has exactly `rows_per_step` rows.
    """
    # 1.1 epochs are eleven tenths, not the float nearest to them, which would add a step.
    steps = max(1, math.ceil(Fraction(str(epochs)) * rows / rows_per_step)) * each
    return steps if max_steps is None else min(steps, max_steps)


@dataclass(frozen=True)
class Planner:
    """Chooses the rows of each step by seed and epoch alone, then packs them for any number of ranks.

    Attributes:
        lengths: (R,) tokens of each usable row.
        row_ids: (R,) dataset index of each usable row.
        rows_per_step: B.
        world_size: W.
        micro_batch_tokens: tokens a bin holds at most.
        micro_batch_size: rows a bin holds at most; None for no limit.
        seed: chooses the order of rows.
        patches: (R,) image patches of each usable row; needed with the next.
        micro_batch_patches: patches a bin holds at most; None for no limit.
        passes: (R,) passes of the forward that each usable row needs; None where all need the same.

    Raises:
        UserError: a row has more patches than a bin, said before the first step.
    """

    lengths: np.ndarray
    row_ids: np.ndarray
    rows_per_step: int
    world_size: int
    micro_batch_tokens: int
    micro_batch_size: int | None
    seed: int
    patches: np.ndarray | None = None
    micro_batch_patches: int | None = None
    passes: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.patches is None or self.micro_batch_patches is None:
            return
        # Unlike rows of too many tokens, those of too many patches are not dropped.
        too_many = np.flatnonzero(self.patches > self.micro_batch_patches)
        if len(too_many):
            row, count = self.row_ids[too_many[0]], self.patches[too_many[0]]
            what = f"{count} image patches, more than --micro_batch_patches {self.micro_batch_patches}"
            how = f"raise it to {self.patches.max()}, or lower --max_pixels"
            raise UserError(f"row {row} of the records (from 0) has {what}: {how}")

    def rows_of(self, step: int) -> np.ndarray:
        """Places (in `row_ids`) of the rows of a step, (B,) int64: the epochs' permutations, one behind the other."""
        count = len(self.row_ids)
        start, stop = step * self.rows_per_step, (step + 1) * self.rows_per_step
        parts = [
            _permutation(self.seed, epoch, count)[max(0, start - epoch * count) : stop - epoch * count]
            for epoch in range(start // count, -(-stop // count))
        ]
        return np.concatenate(parts)

    def reached(self, steps: int) -> list[int]:
        """Dataset rows that the first `steps` steps train on, in the order of the dataset."""
        count = len(self.row_ids)
        epochs, rest = divmod(steps * self.rows_per_step, count)
        places = np.arange(count) if epochs else np.sort(_permutation(self.seed, 0, count)[:rest])
        return self.row_ids[places].tolist()

    def plan(self, step: int) -> StepPlan:
        """Pack the rows of one step into G × W bins.

        Nothing but the step decides: a run that begins anew at any micro-step of it finds the same bins.
        """
        return StepPlan(step, self.packed(self.rows_of(step)))

    def packed(self, places: np.ndarray) -> list[Bins]:
        """Pack rows, given by their places in `row_ids`; see StepPlan.bins."""
        patches, passes = (None if of is None else of[places] for of in (self.patches, self.passes))
        limits = self.micro_batch_tokens, self.micro_batch_size
        bins = pack(self.lengths[places], self.world_size, *limits, patches, self.micro_batch_patches, passes)
        named = [self.row_ids[places[one]].tolist() for one in bins]
        return [named[at : at + self.world_size] for at in range(0, len(named), self.world_size)]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def pack(
    lengths: Sequence[int] | np.ndarray,
    world_size: int,
    capacity: int,
    max_rows: int | None = None,
    patches: Sequence[int] | np.ndarray | None = None,
    patch_capacity: int | None = None,
    passes: np.ndarray | None = None,
) -> Bins:
    """Spread rows over few micro-steps, evenly over their G · W bins.

    Longest-processing-time-first (Graham 1969) deals the rows to the bins of the fewest micro-steps that could do, the
    longest row to the emptiest bin. Exchanges of rows between full and empty bins even out what that leaves. Where a
    bin is still too full, one micro-step more is tried, then as many as first-fit decreasing needs: without patches
    and max_rows at most 11/9 of the fewest bins plus 6/9 (Dósa 2007), rounded up to whole micro-steps. Bins of like
    load share a micro-step, so that ranks wait least.

    Patches are a limit alone; what is evened out is tokens, on which most of a step's arithmetic is spent. Attention's
    part of it grows with the length of a row, but long and short rows are dealt to all bins alike: what a load by FLOPs
    could gain is in the table of benchmarks/packing.py.

    A micro-step has as many passes as the row that needs most: rows of many are brought together, where that costs less
    waiting than it saves.

    Args:
        lengths: tokens of each row.
        capacity: tokens a bin holds at most.
        max_rows: rows a bin holds at most; None for no limit.
        patches: image patches of each row; patch_capacity: patches a bin holds at most, None for no limit.
        passes: passes of the forward that each row needs; None where all need the same.

    Returns:
        G · W bins of indices into `lengths`, in the order (micro-step, rank), heaviest first (of most passes first,
        where rows were brought together); bins may be empty.

    Raises:
        UserError: a row fits into no bin.
    """
    if patch_capacity is not None and patches is None:
        raise ValueError("patch_capacity needs the patches of the rows")
    if patches is None or patch_capacity is None:
        patches, patch_capacity = np.zeros(len(lengths), dtype=np.int64), 1
    tokens, images = np.asarray(lengths, dtype=np.int64), np.asarray(patches, dtype=np.int64)
    _refuse_larger(tokens, "tokens", "--micro_batch_tokens", capacity)
    _refuse_larger(images, "image patches", "--micro_batch_patches", patch_capacity)
    # Both in one unit, the integer in which either capacity is `limit`: no rounding, the same bins on every host.
    sizes, limit = np.stack([tokens * patch_capacity, images * capacity]), capacity * patch_capacity
    most = max_rows or len(tokens) or 1
    order = np.argsort(-sizes.max(axis=0), kind="stable").tolist()
    bins = _fewest_micro_steps(sizes, order, limit, most, world_size)
    bins = [bins[place] for place in np.argsort(-_sums(bins, sizes)[0], kind="stable")]
    if passes is None:
        return bins
    return bring_together(bins, sizes, limit, world_size, passes * PASS_TOKENS * patch_capacity)


def _refuse_larger(sizes: np.ndarray, what: str, flag: str, capacity: int) -> None:
    largest = int(sizes.max(initial=0))
    if largest > capacity:
        raise UserError(f"a row of {largest} {what} does not fit into {flag} {capacity}")


def _fewest_micro_steps(sizes: np.ndarray, order: list[int], limit: int, most: int, width: int) -> Bins:
    """Deal the rows to the bins of as few micro-steps, of `width` bins each, as are found to do."""
    low = max(1, -(-_fewest_bins(sizes, limit, most) // width))
    # Most steps end here; the others try one micro-step more before they take first-fit's number.
    bins = _longest_first(sizes, order, low * width, most)
    if _exchange(bins, sizes, limit, most, width):
        return bins
    fitted = _first_fit(sizes, order, limit, most)
    fitted += [[] for _ in range(-len(fitted) % width)]
    high = len(fitted) // width
    for micro_steps in sorted({min(low + 1, high), high} - {low}):
        bins = _longest_first(sizes, order, micro_steps * width, most)
        if _exchange(bins, sizes, limit, most, width):
            return bins
    _exchange(fitted, sizes, limit, most, width)
    return fitted


def _fewest_bins(sizes: np.ndarray, limit: int, most: int) -> int:
    """A bound from below: no packing has fewer bins.

    By volume, by number, and since a bin holds at most j of the rows that fill more than 1 / (j + 1) of it.
    """
    volume = -(-int(sizes.sum(axis=1).max()) // limit)
    by_size = [-(-int((sizes * (j + 1) > limit).sum(axis=1).max()) // j) for j in range(1, MOST_OF_A_SIZE + 1)]
    return max(volume, -(-len(sizes[0]) // most), *by_size)


def _sums(bins: Bins, sizes: np.ndarray) -> np.ndarray:
    """Tokens and patches of each bin, (2, bins) int64."""
    sums = np.zeros((len(bins), 2), dtype=np.int64)
    rows = np.fromiter(chain.from_iterable(bins), dtype=np.int64)
    np.add.at(sums, np.repeat(np.arange(len(bins)), [len(one) for one in bins]), sizes[:, rows].T)
    return sums.T


def _first_fit(sizes: np.ndarray, order: list[int], limit: int, most: int) -> Bins:
    """Put each row into the first bin with room for it; as many bins as rows suffice."""
    room, image_room = np.full((2, len(order)), limit)
    bins: Bins = []
    for row, tokens, images in zip(order, *sizes[:, order].tolist(), strict=True):
        end = len(bins) + 1
        place = int(((room[:end] >= tokens) & (image_room[:end] >= images)).argmax())
        if place == len(bins):
            bins.append([])
        bins[place].append(row)
        room[place] = room[place] - tokens if len(bins[place]) < most else -1
        image_room[place] -= images
    return bins


def _longest_first(sizes: np.ndarray, order: list[int], count: int, most: int) -> Bins:
    """Put each row into the least loaded of `count` bins, whether it has room or not."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0, place, 0, 0) for place in range(count)]
    for row, tokens, images in zip(order, *sizes[:, order].tolist(), strict=True):
        _, place, held, images_held = heap[0]
        bins[place].append(row)
        if len(bins[place]) < most:
            held, images_held = held + tokens, images_held + images
            heapq.heapreplace(heap, (max(held, images_held), place, held, images_held))
        else:
            heapq.heappop(heap)
    return bins


def _exchange(bins: Bins, sizes: np.ndarray, limit: int, most: int, width: int) -> bool:
    """Even out bins in place: the fullest gives a row to one of the emptiest, or takes one of its rows for it.

    Ends where all are within the limit and ranks, `width` bins a micro-step, would wait little; where nothing helps;
    or after a number of tries.

    Returns:
        Whether all bins are within the limit.
    """
    sums = _sums(bins, sizes)
    # A row of nothing in exchange is a row given away.
    nothing = sizes.shape[1]
    sizes = np.pad(sizes, ((0, 0), (0, 1)))
    if not sizes[1].any():
        # Half the work where there are no patches.
        sizes, sums = sizes[:1], sums[:1]
    loads = _loads(sums, limit)
    budget = TRIES + sizes.shape[1] // 16
    while budget > 0 and not (loads.max() <= limit and _even(loads, width)):
        full = int(loads.argmax())
        held = sums.max(axis=0) if loads[full] > limit else loads
        for empty in np.argsort(held, kind="stable")[:EXCHANGE_WITH].tolist():
            budget -= 1
            gives, takes = bins[full], bins[empty] + [nothing] * (len(bins[empty]) < most)
            gain = sizes[:, gives, None] - sizes[:, None, takes]
            left, got = sums[:, full, None, None] - gain, sums[:, empty, None, None] + gain
            fuller = np.maximum(_loads(left, limit), _loads(got, limit))
            given, taken = divmod(int(fuller.argmin()), len(takes))
            if fuller[given, taken] < loads[full]:
                sums[:, full], sums[:, empty] = left[:, given, taken], got[:, given, taken]
                loads[[full, empty]] = _loads(sums[:, [full, empty]], limit)
                row = bins[full].pop(given)
                if takes[taken] != nothing:
                    bins[full].append(bins[empty].pop(taken))
                bins[empty].append(row)
                break
        else:
            break
    return bool(loads.max() <= limit)


def _loads(sums: np.ndarray, limit: int) -> np.ndarray:
    """What makes a bin full, (…) from (1 or 2, …): its tokens, or its patches where they are above the limit."""
    tokens, *images = sums
    return np.maximum(tokens, np.where(images[0] > limit, images[0], 0)) if images else tokens.copy()


def _even(loads: np.ndarray, width: int) -> bool:
    """Whether ranks wait less than a thousandth of their time when bins of like load share a micro-step."""
    longest = int(np.sort(loads)[::-width].sum())
    return width * longest * (EVEN - 1) <= int(loads.sum()) * EVEN


def neighbours(sizes: Sequence[int], budget: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut a row of things into [first, end), each of `budget` and `most` things at most; a larger one stands alone."""
    first = held = 0
    for number, size in enumerate(sizes):
        if number > first and (held + size > budget or number - first == most):
            yield first, number
            first, held = number, 0
        held += size
    if sizes:
        yield first, len(sizes)
