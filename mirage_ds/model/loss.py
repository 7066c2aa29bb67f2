"""The loss: sums over the rows of a micro-batch, from labelled positions only.

N samples, M labelled positions, V vocabulary, H hidden, R rows trained in place of others, k latents a block, B rows of
the optimizer step.

Stage 1's distance to its targets is latents.grounding; forward.MirageModel brings both here, and run/step.py weighs
them with `objective`.
"""

from typing import NamedTuple

import torch
from torch import nn

from mirage_ds.data.batch import Batch
from mirage_ds.model.chunks import divide
from mirage_ds.model.head import LogProbabilities, WeightedCrossEntropy


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
        earlier: where the last pass has a backward of its own, a scalar whose backward, after the loss's, is that of
            the passes before; it carries every factor of the loss already.
        latents: (N_blocks · k, H) what is fed at batch.latents (in stage1: would be), detached; only where the model
            evaluates.
    """

    ce: torch.Tensor
    sim: torch.Tensor
    token_ce: torch.Tensor
    rows: torch.Tensor
    earlier: torch.Tensor | None = None
    latents: torch.Tensor | None = None


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
        chunk_bytes: memory for one chunk of float32 logits and their softmax (chunks.divide).
        rows: (R, H), trained in place of R rows of a frozen weight (lora.py); row_ids: (R,), which ones.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        chunk_bytes: int,
        rows: nn.Parameter | None = None,
        row_ids: torch.Tensor | None = None,
    ):
        super().__init__()
        self.weight, self.rows, self.chunk_bytes = weight, rows, chunk_bytes
        self.register_buffer("row_ids", row_ids, persistent=False)

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        scales: torch.Tensor | None = None,
        temperature: float = 1.0,
        adapters: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the positions' cross-entropies, and each of them; or each one's log-probability and entropy.

        Args:
            hidden: (M, H) final hidden states; targets: (M,) token ids.
            scales: (M,) float32 weight of each position; None asks for log-probabilities.
            temperature: what the logits are divided by then; adapters: False leaves out `rows`.

        Returns:
            With scales: Σ scales · losses, a float32 scalar, and the (M,) float32 losses, which carry no gradient.
            Without: (M,) log-probabilities of the targets and (M,) entropies in nats, float32, both with a gradient.
        """
        states, parts = hidden.to(self.weight.dtype), self.parts(len(hidden))
        if scales is None:
            rows = self.rows if adapters else None
            logp, entropy = LogProbabilities.apply(states, self.weight, rows, self, targets, temperature, parts)
            return logp, entropy
        own, recorded = (self.rows, self.row_ids), torch.is_grad_enabled()
        total, losses = WeightedCrossEntropy.apply(states, self.weight, *own, targets, scales, parts, recorded)
        return total, losses

    def parts(self, positions: int) -> tuple[int, int]:
        """Return how many of so many positions a chunk has, and how many words a slice (chunks.divide).

        The weight has to be whole.
        """
        vocabulary, hidden = self.weight.shape
        return divide(positions, hidden, vocabulary, self.chunk_bytes, self.weight.is_cuda)


def per_sample_mean(values: torch.Tensor, sample: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of `values` (M,) over each sample (M,) → (N,); 0 for a sample without any."""
    sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, sample, values)
    return sums / counts.clamp(min=1)


def label_scales(batch: Batch, reduction: str) -> torch.Tensor:
    """What each labelled position's cross-entropy weighs in LossSums.ce: (M,) float32.

    Args:
        reduction: "sample" or "token".
    """
    weight = batch.weight if reduction == "token" else batch.weight / batch.label_count.clamp(min=1)
    return weight[batch.target_sample]


def loss_sums(
    total: torch.Tensor, ce: torch.Tensor, one_minus_cosine: torch.Tensor | None, batch: Batch, reduction: str
) -> LossSums:
    """Reduce per-token losses to LossSums.

    Args:
        total: Σ of the cross-entropies as `label_scales` weighs them; ce: (M,) each, in the order of batch.targets.
        one_minus_cosine: (N_runs · k,) in the order of batch.latents, or None outside stage1.
        reduction: "sample" or "token".
    """
    token_ce = (ce * batch.weight[batch.target_sample]).sum()
    rows = per_sample_mean(ce, batch.target_sample, batch.label_count)
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
