"""Packing: which rows an optimizer step has, on which rank and micro-step each lies, and in which pass each token runs.

All of it is integer arithmetic on row lengths, the same on every rank without talking to the others.

B rows an optimizer step, W ranks, G micro-steps of the step, k latents a run, p position of a run's first latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mirage_ds.errors import UserError

Bins = list[list[int]]


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


def total_steps(rows: int, rows_per_step: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run: enough that every row is seen `epochs` times.

    The step that crosses the last epoch's end takes its remaining rows from the beginning of the next one, so that
    every step has exactly `rows_per_step` rows.
    """
    # 1.1 epochs are eleven tenths, not the float nearest to them, which would add a step.
    steps = max(1, math.ceil(Fraction(str(epochs)) * rows / rows_per_step))
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
    """

    lengths: np.ndarray
    row_ids: np.ndarray
    rows_per_step: int
    world_size: int
    micro_batch_tokens: int
    micro_batch_size: int | None
    seed: int

    def rows_of(self, step: int) -> list[int]:
        """Places (in `row_ids`) of the B rows of a step: the epochs' permutations, one behind the other."""
        count = len(self.row_ids)
        at = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        return [int(_permutation(self.seed, int(i) // count, count)[int(i) % count]) for i in at]

    def reached(self, steps: int) -> list[int]:
        """Dataset rows that the first `steps` steps train on, in the order of the dataset."""
        count = len(self.row_ids)
        epochs, rest = divmod(steps * self.rows_per_step, count)
        places = np.arange(count) if epochs else np.sort(_permutation(self.seed, 0, count)[:rest])
        return [int(row) for row in self.row_ids[places]]

    def plan(self, step: int) -> StepPlan:
        """Pack the rows of one step into G × W bins."""
        places = self.rows_of(step)
        lengths = [int(self.lengths[place]) for place in places]
        bins = pack(lengths, self.world_size, self.micro_batch_tokens, self.micro_batch_size)
        named = [[int(self.row_ids[places[i]]) for i in one] for one in bins]
        return StepPlan(step, [named[at : at + self.world_size] for at in range(0, len(named), self.world_size)])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def pack(lengths: Sequence[int], world_size: int, capacity: int, max_rows: int | None = None) -> Bins:
    """Spread rows over few micro-steps, evenly over their G · W bins.

    First-fit decreasing finds G (at most 11/9 of the fewest bins plus 6/9; Dósa 2007); then the longest row goes to
    the emptiest bin, which evens out the ranks' work. Where that greedy step finds no room, the first-fit bins are
    kept.

    Args:
        lengths: tokens of each row, none above `capacity`.

    Returns:
        G · W bins of indices into `lengths`, in the order (micro-step, rank); bins may be empty.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise UserError(f"a row of {longest} tokens does not fit into --micro_batch_tokens {capacity}")
    most = max_rows or len(lengths) or 1
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fitted: Bins = []
    for i in order:
        for one in fitted:
            if len(one) < most and sum(lengths[j] for j in one) + lengths[i] <= capacity:
                one.append(i)
                break
        else:
            fitted.append([i])
    count = max(1, math.ceil(len(fitted) / world_size)) * world_size
    even: Bins = [[] for _ in range(count)]
    loads = [0] * count
    for i in order:
        room = [b for b in range(count) if len(even[b]) < most and loads[b] + lengths[i] <= capacity]
        if not room:
            return fitted + [[] for _ in range(count - len(fitted))]
        best = min(room, key=lambda b: (loads[b], b))
        even[best].append(i)
        loads[best] += lengths[i]
    return even


class PassPlan(NamedTuple):
    """Which packed tokens run in one pass of the forward, and which keys they see.

    Attributes:
        tokens: packed indices of the pass's tokens, sample by sample.
        query_lengths, key_lengths: tokens and visible keys of each sample that takes part.
        keys: for each sample its keys in order, as indices into the keys of passes 0 … this one, concatenated in the
            order in which the passes made them.
        sources: for each sample, the place in the previous pass's tokens whose final hidden state is the input of its
            first token here (a latent); empty in pass 0.
    """

    tokens: np.ndarray
    query_lengths: list[int]
    key_lengths: list[int]
    keys: np.ndarray
    sources: np.ndarray


def schedule(lengths: Sequence[int], runs: Sequence[Sequence[tuple[int, int]]], passes: int) -> list[PassPlan]:
    """Plan the passes of the recurrent stage (or the single pass of the others) over a packed micro-batch.

    With runs of k latents at positions p₁ < p₂ < …: pass 0 runs [0, p₁); pass j, 1 ≤ j < k, the j-th latent alone;
    pass k the last latent with all that follows up to p₂; and so on, runs · k + 1 passes in all. A sample without
    latents lies whole in pass 0 and takes part in no other.

    Args:
        lengths: tokens of each sample of the micro-batch.
        runs: the latent runs of each sample as (p, k); all empty where there is one pass.
        passes: passes of every micro-batch of the run, at least the most any sample needs.

    Returns:
        One PassPlan a pass.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pass_of = np.zeros(int(starts[-1]), dtype=np.int64)
    for sample, sample_runs in enumerate(runs):
        number = 0
        for p, k in sample_runs:
            at = int(starts[sample]) + p
            pass_of[at : at + k] = number + 1 + np.arange(k)
            number += k
            pass_of[at + k : int(starts[sample + 1])] = number
    if int(pass_of.max(initial=0)) >= passes:
        raise ValueError(f"a sample needs {int(pass_of.max()) + 1} passes, the run has {passes}")
    sample_of = np.repeat(np.arange(len(lengths)), lengths)
    # A stable sort by pass keeps samples, and tokens within them, in order: the order in which keys are made.
    made = np.argsort(pass_of, kind="stable")
    place_of = np.empty_like(made)
    place_of[made] = np.arange(len(made))
    plans: list[PassPlan] = []
    before = np.empty(0, dtype=np.int64)
    for number in range(passes):
        tokens = np.flatnonzero(pass_of == number)
        members, first, counts = np.unique(sample_of[tokens], return_index=True, return_counts=True)
        visible = np.isin(sample_of, members) & (pass_of <= number)
        _, key_counts = np.unique(sample_of[visible], return_counts=True)
        sources = np.searchsorted(before, tokens[first] - 1) if number else np.empty(0, dtype=np.int64)
        plans.append(
            PassPlan(
                tokens=tokens,
                query_lengths=counts.tolist(),
                key_lengths=key_counts.tolist(),
                keys=place_of[np.flatnonzero(visible)],
                sources=sources,
            )
        )
        before = tokens
    return plans
