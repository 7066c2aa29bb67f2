"""In which pass of the forward each packed token runs, and which keys it sees. Integers alone, the same on every rank.

k latents a block, p position of a block's first latent.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PassPlan(NamedTuple):
    """Which packed tokens run in one pass of the forward, and which keys they see.

    Attributes:
        tokens: packed indices of the pass's tokens, sample by sample.
        query_lengths, key_lengths: tokens and visible keys of each sample that takes part.
        keys: for each sample its keys in order, as indices into the keys of passes 0 … this one, concatenated in the
            order in which the passes made them.
        sources: for each sample, the place in the previous pass's tokens whose final hidden state is the input of its
            first token here (a latent); empty in pass 0, and where nothing is fed back.
    """

    tokens: np.ndarray
    query_lengths: list[int]
    key_lengths: list[int]
    keys: np.ndarray
    sources: np.ndarray


def schedule(lengths: Sequence[int], runs: Sequence[Sequence[tuple[int, int]]], passes: int) -> list[PassPlan]:
    """Plan the passes of the recurrent stage (or the single pass of the others) over a packed micro-batch.

    With blocks of k latents at positions p₁ < p₂ < …: pass 0 runs [0, p₁); pass j, 1 ≤ j < k, the j-th latent alone;
    pass k the last latent with all that follows up to p₂; and so on, blocks · k + 1 passes in all. A sample without
    latents lies whole in pass 0 and takes part in no other.

    Args:
        lengths: tokens of each sample of the micro-batch.
        runs: the latent blocks of each sample as (p, k); all empty where there is one pass.
        passes: of the forward, at least the most any sample needs.

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
        raise ValueError(f"a sample needs {int(pass_of.max()) + 1} passes, there are {passes}")
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
        keys = place_of[np.flatnonzero(visible)]
        plans.append(PassPlan(tokens, counts.tolist(), key_counts.tolist(), keys, sources))
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
    of_text = PassPlan(text, counts.tolist(), counts.tolist(), place_of[text], none)
    lengths_of_blocks, keys = [k for _, _, k in spans], place_of[np.concatenate(visible)]
    return [of_text, PassPlan(latents, lengths_of_blocks, [len(one) for one in visible], keys, none)]
