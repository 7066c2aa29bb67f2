"""In which passes of the forward a packed token runs, and which keys it sees. Integers alone, the same on all ranks.

k latents a block, p position of a block's first latent, T passes of a block whose latents are made together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mirage_ds.config.run import passes_of_block


class PassPlan(NamedTuple):
    """Which packed tokens run in one pass of the forward, and which keys they see.

    Attributes:
        tokens: packed indices of the pass's tokens, sample by sample.
        query_lengths, key_lengths: tokens and visible keys of each part of the pass: of each sample that takes part, or
            where tokens of a sample see unlike keys (schedule's `hidden`), of each of its stretches that see alike.
        keys: for each part its keys in order, as indices into the keys of passes 0 … this one, concatenated in the
            order in which the passes made them. A key may stand in several parts.
        fed: places in `tokens` of latents whose input is the state before them; none in pass 0.
        sources: for each of these, the place in the previous pass's tokens of that state.
    """

    tokens: np.ndarray
    query_lengths: list[int]
    key_lengths: list[int]
    keys: np.ndarray
    fed: np.ndarray
    sources: np.ndarray


def schedule(
    lengths: Sequence[int],
    runs: Sequence[Sequence[tuple[int, int]]],
    passes: int,
    latent_passes: int | None = None,
    hidden: Sequence[Sequence[int] | np.ndarray] = (),
) -> list[PassPlan]:
    """Plan the passes of the recurrent stage (or the single pass of the others) over a packed micro-batch.

    With blocks of k latents at positions p₁ < p₂ < …: pass 0 runs [0, p₁); pass j, 1 ≤ j < k, the j-th latent alone;
    pass k the last latent with all that follows up to p₂; and so on, blocks · k + 1 passes in all. A sample without
    latents lies whole in pass 0 and takes part in no other.

    With T: pass 0 runs [0, p₁ + k); pass t, 1 ≤ t < T, the latents from the t-th on once more, each fed the state
    before it of pass t − 1, for those before have theirs for good (the t-th pass of the recurrence would be the same);
    pass T these with all that follows up to p₂ + k; blocks · min(T, k) + 1 passes. Keys of earlier runs are not seen.

    Text behind a sample's first block does not see its hidden tokens; latents and what stands before do. No token runs
    in another pass for that: within a pass, such text is a part of its own.

    Args:
        lengths: tokens of each sample of the micro-batch.
        runs: the latent blocks of each sample as (p, k).
        passes: of the forward, at least the most any sample needs; 1 runs all at once, nothing is fed back.
        latent_passes: T; None where latents are made in turn.
        hidden: places in each sample, before its first block, that text behind that does not see; none if not given.

    Returns:
        One PassPlan a pass.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # The first and the last pass in which each token runs, and from which on its input is a state.
    begin, end, fed = np.zeros((3, int(starts[-1])), dtype=np.int64)
    fed[:] = passes
    unseen, blind = np.zeros((2, len(begin)), dtype=bool)
    for sample, places in enumerate(hidden):
        unseen[starts[sample] + np.asarray(places, dtype=np.int64)] = True
    for sample, sample_runs in enumerate(runs):
        row, number = slice(int(starts[sample]), int(starts[sample + 1])), 0
        for p, k in sample_runs:
            slots, added = np.arange(k), passes_of_block(k, latent_passes)
            own, after = slice(row.start + p, row.start + p + k), slice(row.start + p + k, row.stop)
            blind[own], blind[after] = False, unseen[row].any()
            if passes == 1:
                continue
            if latent_passes is None:
                begin[own] = end[own] = fed[own] = number + 1 + slots
            else:
                begin[own], end[own], fed[own] = number, number + np.minimum(added, slots + 1), number + 1
            number += added
            begin[after] = end[after] = number
    if int(end.max(initial=0)) >= passes:
        raise ValueError(f"a sample needs {int(end.max()) + 1} passes, there are {passes}")
    sample_of = np.repeat(np.arange(len(lengths)), lengths)
    place_of, made = np.empty_like(begin), 0
    plans: list[PassPlan] = []
    before = none = np.empty(0, dtype=np.int64)
    for number in range(passes):
        tokens = np.flatnonzero((begin <= number) & (number <= end))
        # Keys are made in this order; of a token that runs again those of now are seen.
        place_of[tokens] = made + np.arange(len(tokens))
        made += len(tokens)
        first = np.flatnonzero(np.diff(2 * sample_of[tokens] + blind[tokens], prepend=-1))
        counts = np.diff(first, append=len(tokens))
        keys = []
        for last in tokens[first + counts - 1]:
            seen = np.arange(starts[sample_of[last]], last + 1)
            keys.append(seen[~unseen[seen]] if blind[last] else seen)
        here = np.flatnonzero(fed[tokens] <= number)
        sources = np.searchsorted(before, tokens[here] - 1)
        placed = place_of[np.concatenate([none, *keys])]
        plans.append(PassPlan(tokens, counts.tolist(), [len(one) for one in keys], placed, here, sources))
        before = tokens
    return plans


def schedule_auxiliary(lengths: Sequence[int], runs: Sequence[Sequence[tuple[int, int]]]) -> list[PassPlan]:
    """Plan the two passes of stage 1 whose answer does not attend to the latents.

    Pass 0 runs all tokens but the latents; pass 1 the latents, each block a sequence of its own that sees the tokens
    before it and itself, but no other block. Nothing is fed back: latents are given their targets.

    Args:
        lengths: tokens of each sample; runs: the latent blocks of each as (p, k), at least one in the micro-batch.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    is_latent = np.zeros(int(starts[-1]), dtype=bool)
    spans = [(int(starts[sample]), int(starts[sample]) + p, k) for sample, own in enumerate(runs) for p, k in own]
    for _, at, k in spans:
        is_latent[at : at + k] = True
    text, latents = np.flatnonzero(~is_latent), np.flatnonzero(is_latent)
    place_of = np.empty(len(is_latent), dtype=np.int64)
    place_of[np.concatenate([text, latents])] = np.arange(len(is_latent))
    counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[text], minlength=len(lengths))
    none = np.empty(0, dtype=np.int64)
    visible = []
    for begin, at, k in spans:
        before = np.arange(begin, at)
        visible.append(np.concatenate([before[~is_latent[before]], np.arange(at, at + k)]))
    of_text = PassPlan(text, counts.tolist(), counts.tolist(), place_of[text], none, none)
    lengths_of_blocks, keys = [k for _, _, k in spans], place_of[np.concatenate(visible)]
    return [of_text, PassPlan(latents, lengths_of_blocks, [len(one) for one in visible], keys, none, none)]
