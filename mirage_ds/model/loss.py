"""The loss: sums over the rows of a micro-batch, from labelled positions only.

N samples, M labelled positions, C of a chunk, V vocabulary, H hidden, k latents a block, B rows of the optimizer step.

Stage 1's distance to its targets is latents.grounding; forward.MirageModel brings both here, and run/step.py weighs
them with `objective`.

No tensor of size T × V is ever made: the head runs on the M labelled positions in chunks whose logits fit a budget.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from mirage_ds.data.batch import Batch
from mirage_ds.model.chunks import divide


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
    """

    ce: torch.Tensor
    sim: torch.Tensor
    token_ce: torch.Tensor
    rows: torch.Tensor
    earlier: torch.Tensor | None = None


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
        self, hidden: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the positions' cross-entropies, and each of them.

        Args:
            hidden: (M, H) final hidden states; targets: (M,) token ids; scales: (M,) float32 weight of each position.

        Returns:
            Σ scales · losses, a float32 scalar, and the (M,) float32 losses, which carry no gradient.
        """
        own, states, recorded = (self.rows, self.row_ids), hidden.to(self.weight.dtype), torch.is_grad_enabled()
        parts = self.parts(len(states))
        total, losses = _WeightedCrossEntropy.apply(states, self.weight, *own, targets, scales, parts, recorded)
        return total, losses

    def parts(self, positions: int) -> tuple[int, int]:
        """Return how many of so many positions a chunk has, and how many words a slice (chunks.divide).

        The weight has to be whole.
        """
        vocabulary, hidden = self.weight.shape
        return divide(positions, hidden, vocabulary, self.chunk_bytes, self.weight.is_cuda)


def products_of(weight: torch.Tensor) -> torch.dtype:
    """Return what the head's products read: a GPU multiplies bf16 into float32 logits.

    A CPU computes in float32: without bf16 instructions its bf16 products take hundreds of times as long.
    """
    return weight.dtype if weight.is_cuda else torch.float32


def _logits(states: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply (C, H) and (V, H) into float32 (C, V)."""
    kept = {} if states.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.mm(states, rows.t(), out=out, **kept)


def _make_by_words(
    by_matrix: torch.Tensor,
    states: torch.Tensor,
    matrix: torch.Tensor,
    log_sums: torch.Tensor,
    targets: torch.Tensor,
    scales: torch.Tensor,
    words: int,
) -> None:
    """Fill the gradient of the matrix, (V, H), in slices of S words: each is one product over all positions.

    Args:
        log_sums: (M, 1) logarithms of each position's Σ exp(logits).
    """
    for at in range(0, len(matrix), words):
        there = matrix[at : at + words]
        slope = _logits(states, there).sub_(log_sums).exp_().mul_(scales[:, None])
        # No look at the targets, which would wait for the GPU.
        place = (targets - at).clamp(0, len(there) - 1)
        hit = torch.where(place + at == targets, -scales, 0.0)
        slope.scatter_add_(1, place[:, None], hit[:, None])
        by_matrix[at : at + words] = torch.mm(slope.to(states.dtype).t(), states)
        del slope  # before the next one comes


class _WeightedCrossEntropy(torch.autograd.Function):
    """Σ scales · cross-entropy over chunks of C rows, with the gradients made on the way.

    torch's `linear_cross_entropy` can do this for sums whose rows all weigh the same; for others its backward computes
    the logits once more, a quarter of the head's work. The gradient of the weight, (V, H), waits between forward and
    backward, when nothing but activations is held; backward needs as much anyway.

    Rows that stand in place of the weight's own overwrite their logits: a matrix with them inside would be a second
    (V, H). A frozen weight gets no gradient, and none is made; nor is any under no_grad, which `forward` cannot see: it
    always runs without, and `needs_input_grad` tells of the tensors alone.

    The gradient of a float32 weight is summed over the chunks. One of bf16 would be rounded at every chunk, and a
    float32 sum of it be 4 V H bytes, read and written by every chunk. So its logits are made once more, in slices of
    the vocabulary that hold no more than a chunk does: a third more products in the head, for about the time of that
    traffic (0.4 % of a 7B's step with a fifth of its tokens labelled).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        rows: torch.Tensor | None,
        row_ids: torch.Tensor | None,
        targets: torch.Tensor,
        scales: torch.Tensor,
        parts: tuple[int, int],
        recorded: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = products_of(weight)
        states, matrix = hidden.to(dtype), weight.to(dtype)
        most, words = parts
        losses, log_sums = scales.new_empty(len(states)), scales.new_empty(len(states), 1)
        wanted, summed = recorded and any(ctx.needs_input_grad[:3]), weight.dtype == torch.float32
        by_state = torch.empty_like(states) if wanted else None
        by_matrix = torch.empty_like(weight) if wanted and ctx.needs_input_grad[1] else None
        # Both buffers serve every chunk. torch_autocast casts no product that writes into a given tensor: the head's
        # stay float32, as its weight does.
        logits, softmax = (scales.new_empty(most, len(matrix)) for _ in range(2))
        own = None
        if rows is not None and row_ids is not None:
            # (R, H), a buffer for its logits, its gradient.
            own = row_ids, rows.to(dtype), scales.new_empty(most, len(rows)), torch.zeros_like(rows, dtype=dtype)
        for at in range(0, len(states), most):
            here = slice(at, min(at + most, len(states)))
            some, right = states[here], targets[here, None]
            scores = _logits(some, matrix, logits[: len(some)])
            if own is not None:
                ids, theirs, few, _ = own
                scores.index_copy_(1, ids, _logits(some, theirs, few[: len(some)]))
            logs = torch.log_softmax(scores, dim=1, out=softmax[: len(some)])
            chosen = logs.gather(1, right)
            losses[here] = -chosen[:, 0]
            if by_state is None:
                continue
            # ∂/∂logits = scale · (softmax − 1 at the target).
            slope = logs.exp_().scatter_add_(1, right, logs.new_full(right.shape, -1.0))
            slope = slope.mul_(scales[here, None]).to(dtype)
            if own is None:
                torch.mm(slope, matrix, out=by_state[here])
            else:
                ids, theirs, _, by_rows = own
                by_own = slope.index_select(1, ids)
                slope.index_fill_(1, ids, 0)
                torch.mm(slope, matrix, out=by_state[here])
                by_state[here].addmm_(by_own, theirs)
                by_rows.addmm_(by_own.t(), some)
            if by_matrix is None:
                continue
            if not summed:
                log_sums[here] = scores.gather(1, right) - chosen
            elif at:
                by_matrix.addmm_(slope.t(), some)
            else:
                torch.mm(slope.t(), some, out=by_matrix)
        if by_matrix is not None and not summed:
            del logits, softmax, scores, logs, slope  # a slice takes as much
            _make_by_words(by_matrix, states, matrix, log_sums, targets, scales, words)
        if by_state is not None:
            # Not save_for_backward: while it holds the tensors, autograd copies them into the parameter's gradient.
            ctx.made = by_state.to(hidden.dtype), by_matrix, None if own is None else own[-1].to(weight.dtype)
        ctx.mark_non_differentiable(losses)
        return (losses * scales).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError("the head's gradients are made once: backward through it twice is not possible")
        made, ctx.made = ctx.made, None
        # In place: a second (V, H) would be the largest tensor of all.
        return *(None if one is None else one.mul_(gradients[0]) for one in made), None, None, None, None, None


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
