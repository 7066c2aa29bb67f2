"""What the loss head computes: chunks of logits, and gradients from them.

M labelled positions, C of a chunk, V vocabulary, S words of a slice of it, H hidden, R rows trained in place of others.

No tensor of size T × V is ever made: the head runs on the M labelled positions in chunks whose logits fit a budget.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


def products_of(weight: torch.Tensor) -> torch.dtype:
    """Return what the head's products read: a GPU multiplies bf16 into float32 logits.

    A CPU computes in float32: without bf16 instructions its bf16 products take hundreds of times as long.
    """
    return weight.dtype if weight.is_cuda else torch.float32


def _logits(states: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply (C, H) and (V, H) into float32 (C, V)."""
    kept = {} if states.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.mm(states, rows.t(), out=out, **kept)


class Slope(NamedTuple):
    """∂/∂logits of M positions: scale · (softmax − 1 at the target) + tilt · softmax · (log-softmax + entropy).

    Attributes:
        scale: (M,) float32; tilt, entropy: (M,) float32, or None where nothing depends on the entropy.
        temperature: what the logits are divided by; its own factor is in scale and tilt already.
    """

    scale: torch.Tensor
    tilt: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    temperature: float = 1.0

    def fill(
        self, logs: torch.Tensor, place: torch.Tensor, hit: torch.Tensor, here: slice, work: torch.Tensor | None
    ) -> torch.Tensor:
        """Turn logarithms of the softmax (C, S) into the slope, in place.

        Args:
            place: (C, 1) the target's column; hit: (C, 1) −1, or 0 where the target is no column.
            here: which positions; work: (C, S) for the tilt, else None.
        """
        tilted = None
        if self.tilt is not None and self.entropy is not None:
            tilted = torch.add(logs, self.entropy[here, None], out=work).mul_(self.tilt[here, None])
        softmax = logs.exp_()
        if tilted is not None:
            tilted.mul_(softmax)
        slope = softmax.scatter_add_(1, place, hit).mul_(self.scale[here, None])
        return slope if tilted is None else slope.add_(tilted)


class Chunks:
    """One walk over the chunks of a head: logits, and the gradients that follow from their slopes.

    Rows that stand in place of the weight's own overwrite their logits: a matrix with them inside would be a second
    (V, H). Two buffers serve every chunk. torch_autocast casts no product that writes into a given tensor: the head's
    stay float32, as its weight does.

    The gradient of a float32 weight is summed over the chunks. One of bf16 would be rounded at every chunk, and a
    float32 sum of it be 4 V H bytes, read and written by every chunk. So its logits are made once more, in slices of
    the vocabulary that hold no more than a chunk does: a third more products in the head, for about the time of that
    traffic (0.4 % of a 7B's step with a fifth of its tokens labelled).

    Args:
        hidden: (M, H); weight: (V, H); rows, row_ids: (R, H) and (R,), or None; most: C.
        wanted: whether gradients of hidden, weight and rows are to be made.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        rows: torch.Tensor | None,
        row_ids: torch.Tensor | None,
        most: int,
        wanted: tuple[bool, bool],
    ):
        dtype = products_of(weight)
        self.states, self.matrix, self.like = hidden.to(dtype), weight.to(dtype), (hidden.dtype, weight.dtype)
        self.here = [slice(at, min(at + most, len(hidden))) for at in range(0, len(hidden), most)]
        narrow = hidden.new_empty(0, dtype=torch.float32)
        self.work, self.softmax = (narrow.new_empty(most, len(self.matrix)) for _ in range(2))
        self.own = None
        if rows is not None and row_ids is not None:
            # A buffer for their logits, their gradient.
            by_rows = torch.zeros_like(rows, dtype=dtype)
            self.own = row_ids, rows.to(dtype), narrow.new_empty(most, len(rows)), by_rows
        self.by_state = torch.empty_like(self.states) if wanted[0] else None
        self.by_matrix = torch.empty_like(weight) if wanted[1] else None
        self.summed = weight.dtype == torch.float32

    def logs(self, here: slice, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a chunk's logits over the temperature and the logarithms of their softmax, both (C, V)."""
        some = self.states[here]
        scores = _logits(some, self.matrix, self.work[: len(some)])
        if self.own is not None:
            ids, theirs, few, _ = self.own
            scores.index_copy_(1, ids, _logits(some, theirs, few[: len(some)]))
        if temperature != 1:
            scores.div_(temperature)
        return scores, torch.log_softmax(scores, dim=1, out=self.softmax[: len(some)])

    def add(self, slope: torch.Tensor, here: slice) -> None:
        """Take a chunk's slope (C, V) into the gradients."""
        assert self.by_state is not None
        some, slope = self.states[here], slope.to(self.states.dtype)
        if self.own is None:
            torch.mm(slope, self.matrix, out=self.by_state[here])
        else:
            ids, theirs, _, by_rows = self.own
            by_own = slope.index_select(1, ids)
            slope.index_fill_(1, ids, 0)
            torch.mm(slope, self.matrix, out=self.by_state[here])
            self.by_state[here].addmm_(by_own, theirs)
            by_rows.addmm_(by_own.t(), some)
        if self.by_matrix is None or not self.summed:
            return
        if here.start:
            self.by_matrix.addmm_(slope.t(), some)
        else:
            torch.mm(slope.t(), some, out=self.by_matrix)

    def made(self, log_sums: torch.Tensor, targets: torch.Tensor, slope: Slope, words: int) -> Any:
        """Return the gradients of hidden, weight and rows, None for those that are not wanted.

        Args:
            log_sums: (M, 1) logarithms of each position's Σ exp(logits); targets: (M,); words: S.
        """
        if self.by_matrix is not None and not self.summed:
            del self.work, self.softmax  # a slice takes as much
            self._by_words(self.by_matrix, log_sums, targets, slope, words)
        hidden, weight = self.like
        by_state = None if self.by_state is None else self.by_state.to(hidden)
        return by_state, self.by_matrix, None if self.own is None else self.own[-1].to(weight)

    def _by_words(
        self, by_matrix: torch.Tensor, log_sums: torch.Tensor, targets: torch.Tensor, slope: Slope, words: int
    ) -> None:
        """Fill the gradient of the matrix, (V, H), in slices of S words: each is one product over all positions."""
        if slope.tilt is not None:
            words = max(1, words // 2)
        for at in range(0, len(self.matrix), words):
            there = self.matrix[at : at + words]
            logs = _logits(self.states, there)
            if slope.temperature != 1:
                logs.div_(slope.temperature)
            # No look at the targets, which would wait for the GPU.
            place = (targets - at).clamp(0, len(there) - 1)
            hit = torch.where(place + at == targets, -1.0, 0.0)
            one = slope.fill(logs.sub_(log_sums), place[:, None], hit[:, None], slice(None), None)
            by_matrix[at : at + words] = torch.mm(one.to(self.states.dtype).t(), self.states)
            del logs, one  # before the next one comes


class WeightedCrossEntropy(torch.autograd.Function):
    """Σ scales · cross-entropy over chunks of C rows, with the gradients made on the way.

    torch's `linear_cross_entropy` can do this for sums whose rows all weigh the same; for others its backward computes
    the logits once more, a quarter of the head's work. The gradient of the weight, (V, H), waits between forward and
    backward, when nothing but activations is held; backward needs as much anyway.

    A frozen weight gets no gradient, and none is made; nor is any under no_grad, which `forward` cannot see: it always
    runs without, and `needs_input_grad` tells of the tensors alone.
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
        """Return Σ scales · losses, and the (M,) losses."""
        wanted = recorded and any(ctx.needs_input_grad[:3])
        chunks = Chunks(hidden, weight, rows, row_ids, parts[0], (wanted, wanted and ctx.needs_input_grad[1]))
        losses, log_sums = scales.new_empty(len(hidden)), scales.new_empty(len(hidden), 1)
        slope = Slope(scales)
        for here in chunks.here:
            scores, logs = chunks.logs(here)
            right = targets[here, None]
            chosen = logs.gather(1, right)
            losses[here] = -chosen[:, 0]
            if not wanted:
                continue
            log_sums[here] = scores.gather(1, right) - chosen
            chunks.add(slope.fill(logs, right, logs.new_full(right.shape, -1.0), here, None), here)
            del scores, logs
        # Not save_for_backward: while it holds the tensors, autograd copies them into the parameter's gradient.
        ctx.made = chunks.made(log_sums, targets, slope, parts[1]) if wanted else None
        ctx.mark_non_differentiable(losses)
        return (losses * scales).sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return what forward has made, times the loss's own factor."""
        if ctx.made is None:
            raise RuntimeError("the head's gradients are made once: backward through it twice is not possible")
        made, ctx.made = ctx.made, None
        # In place: a second (V, H) would be the largest tensor of all.
        return *(None if one is None else one.mul_(gradients[0]) for one in made), None, None, None, None, None


class Head(Protocol):
    """What LogProbabilities reads of a loss.LossHead, in forward and again in backward."""

    weight: nn.Parameter
    rows: nn.Parameter | None
    row_ids: torch.Tensor | None


class LogProbabilities(torch.autograd.Function):
    """Log-probability of each target and entropy of its distribution, over chunks of C rows.

    What a policy's loss weighs each of them with is known only once all are there, so backward makes a chunk's logits
    again. It reads the weight again too: under ZeRO-3 a saved one would stay gathered.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        rows: torch.Tensor | None,
        head: Head,
        targets: torch.Tensor,
        temperature: float,
        parts: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (M,) log-probabilities and (M,) entropies, float32."""
        chunks = Chunks(hidden, weight, rows, head.row_ids, parts[0], (False, False))
        logp, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        log_sums = logp.new_empty(len(hidden), 1)
        for here in chunks.here:
            scores, logs = chunks.logs(here, temperature)
            right = targets[here, None]
            chosen = logs.gather(1, right)
            logp[here], log_sums[here] = chosen[:, 0], scores.gather(1, right) - chosen
            entropy[here] = -torch.exp(logs, out=scores).mul_(logs).sum(1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, targets, log_sums, entropy)
        ctx.rest = head, temperature, parts
        return logp, entropy

    @staticmethod
    def backward(
        ctx: Any, by_logp: torch.Tensor | None, by_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Make the gradients of hidden, weight and rows; either gradient may be missing."""
        hidden, targets, log_sums, entropy = ctx.saved_tensors
        (head, temperature, parts), wanted = ctx.rest, ctx.needs_input_grad
        chunks = Chunks(hidden, head.weight.detach(), head.rows, head.row_ids, parts[0], (True, wanted[1]))
        scale = entropy.new_zeros(len(hidden)) if by_logp is None else by_logp / -temperature
        tilt = None if by_entropy is None else by_entropy / -temperature
        slope = Slope(scale, tilt, entropy, temperature)
        for here in chunks.here:
            scores, logs = chunks.logs(here, temperature)
            right = targets[here, None]
            chunks.add(slope.fill(logs, right, logs.new_full(right.shape, -1.0), here, scores), here)
            del scores, logs
        return *chunks.made(log_sums, targets, slope, parts[1]), None, None, None, None
