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
        query_lengths, key_lengths: tokens and visible keys of each sample that takes part.
        keys: for each sample its keys in order, as indices into the keys of passes 0 … this one, concatenated in the
            order in which the passes made them.
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
    lengths: Sequence[int], runs: Sequence[Sequence[tuple[int, int]]], passes: int, latent_passes: int | None = None
) -> list[PassPlan]:
    """Plan the passes of the recurrent stage (or the single pass of the others) over a packed micro-batch.

    With blocks of k latents at positions p₁ < p₂ < …: pass 0 runs [0, p₁); pass j, 1 ≤ j < k, the j-th latent alone;
    pass k the last latent with all that follows up to p₂; and so on, blocks · k + 1 passes in all. A sample without
    latents lies whole in pass 0 and takes part in no other.

    With T: pass 0 runs [0, p₁ + k); pass t, 1 ≤ t < T, the latents from the t-th on once more, each fed the state
    before it of pass t − 1, for those before have theirs for good (the t-th pass of the recurrence would be the same);
    pass T these with all that follows up to p₂ + k; blocks · min(T, k) + 1 passes. Keys of earlier runs are not seen.

    Args:
        lengths: tokens of each sample of the micro-batch.
        runs: the latent blocks of each sample as (p, k); all empty where there is one pass.
        passes: of the forward, at least the most any sample needs.
        latent_passes: T; None where latents are made in turn.

    Returns:
        One PassPlan a pass.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # The first and the last pass in which each token runs, and from which on its input is a state.
    begin, end, fed = np.zeros((3, int(starts[-1])), dtype=np.int64)
    fed[:] = passes
    for sample, sample_runs in enumerate(runs):
        number = 0
        for p, k in sample_runs:
            at, slots, added = int(starts[sample]) + p, np.arange(k), passes_of_block(k, latent_passes)
            own = slice(at, at + k)
            if latent_passes is None:
                begin[own] = end[own] = fed[own] = number + 1 + slots
            else:
                begin[own], end[own], fed[own] = number, number + np.minimum(added, slots + 1), number + 1
            number += added
            after = slice(at + k, int(starts[sample + 1]))
            begin[after] = end[after] = number
    if int(end.max(initial=0)) >= passes:
        raise ValueError(f"a sample needs {int(end.max()) + 1} passes, there are {passes}")
    sample_of = np.repeat(np.arange(len(lengths)), lengths)
    place_of, made = np.empty_like(begin), 0
    plans: list[PassPlan] = []
    before = np.empty(0, dtype=np.int64)
    for number in range(passes):
        tokens = np.flatnonzero((begin <= number) & (number <= end))
        # Keys are made in this order; of a token that runs again those of now are seen.
        place_of[tokens] = made + np.arange(len(tokens))
        made += len(tokens)
        members, counts = np.unique(sample_of[tokens], return_counts=True)
        visible = np.isin(sample_of, members) & (begin <= number)
        _, key_counts = np.unique(sample_of[visible], return_counts=True)
        here = np.flatnonzero(fed[tokens] <= number)
        sources = np.searchsorted(before, tokens[here] - 1)
        plans.append(PassPlan(tokens, counts.tolist(), key_counts.tolist(), place_of[visible], here, sources))
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
