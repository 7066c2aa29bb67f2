"""The loss: sums over the rows of a micro-batch, from labelled positions only.

N samples, M labelled positions, V vocabulary, H hidden, k latents a run, B rows of the optimizer step.

No tensor of size T × V is ever made: the head runs on the M labelled positions in chunks whose logits fit a budget.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mirage_ds.data.batch import Batch


class LossSums(NamedTuple):
    """Sums over a micro-batch, never means, as scalar float32 tensors.

    A NamedTuple, because DeepSpeed hooks only tensors, tuples, lists and dicts: a dataclass would lose its backward
    hooks without a word.

    Attributes:
        ce: Σ of the rows' mean cross-entropies (reduction "sample") or Σ over labelled tokens ("token").
        sim: Σ of the rows' 1 − mean cosine ("sample") or Σ over latents of 1 − cosine ("token"); 0 outside stage1.
        token_ce: Σ over labelled tokens of the cross-entropy, detached: the same number whatever the reduction.
        rows: (N,) each sample's mean cross-entropy (plus 1 − mean cosine in stage1), 0 for a dummy, detached: tells
            which sample is not finite.
    """

    ce: torch.Tensor
    sim: torch.Tensor
    token_ce: torch.Tensor
    rows: torch.Tensor


class StepCounts(NamedTuple):
    """What a whole optimizer step counts, over all ranks and micro-steps; known from its plan."""

    rows: int
    labels: int
    latents: int


def objective(
    sums: LossSums, counts: StepCounts, gamma: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn a micro-batch's sums into its share of the step's mean loss.

    Equation 3 of arXiv 2506.17218 with the public code's weights: γ · CE + (1 − mean cosine).

    Returns:
        (loss, ce, sim), scalars whose sum over all micro-batches is the step's mean.
    """
    ce = sums.ce / (counts.rows if reduction == "sample" else max(1, counts.labels))
    sim = sums.sim / (counts.rows if reduction == "sample" else max(1, counts.latents))
    return gamma * ce + sim, ce, sim


class LossHead(nn.Module):
    """Language-model head and cross-entropy in one module, so that ZeRO-3 gathers the weight around both.

    Args:
        weight: (V, H), the model's own parameter (the embedding's, where they are tied).
        chunk_bytes: memory for one chunk of float32 logits.
    """

    def __init__(self, weight: nn.Parameter, vocabulary: int, chunk_bytes: int):
        super().__init__()
        self.weight = weight
        # torch's own choice of chunk is one row at this shape (10 × slower); the budget decides instead.
        self.chunk = max(1, chunk_bytes // (4 * vocabulary))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each position, float32.

        Args:
            hidden: (M, H) final hidden states; targets: (M,) token ids.

        Returns:
            (M,) losses.
        """
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=min(self.chunk, len(targets)), chunking_method=None)
        return functional.linear_cross_entropy(hidden, self.weight, targets, reduction="none", options=options).float()


def per_sample_mean(values: torch.Tensor, sample: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of `values` (M,) over each sample (M,) → (N,); 0 for a sample without any."""
    sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, sample, values)
    return sums / counts.clamp(min=1)


def loss_sums(ce: torch.Tensor, one_minus_cosine: torch.Tensor | None, batch: Batch, reduction: str) -> LossSums:
    """Reduce per-token losses to LossSums.

    Args:
        ce: (M,) cross-entropies in the order of batch.targets.
        one_minus_cosine: (N_runs · k,) in the order of batch.latents, or None outside stage1.
        reduction: "sample" or "token".
    """
    token_weight = batch.weight[batch.target_sample]
    token_ce = (ce * token_weight).sum()
    rows = per_sample_mean(ce, batch.target_sample, batch.label_count)
    total = (rows * batch.weight).sum() if reduction == "sample" else token_ce
    if one_minus_cosine is None:
        sim = token_ce.new_zeros(())
    else:
        means = per_sample_mean(one_minus_cosine, batch.latent_sample, batch.latent_count)
        rows = rows + means
        if reduction == "sample":
            sim = (means * batch.weight).sum()
        else:
            sim = (one_minus_cosine * batch.weight[batch.latent_sample]).sum()
    return LossSums(ce=total, sim=sim, token_ce=token_ce.detach(), rows=(rows * batch.weight).detach())
