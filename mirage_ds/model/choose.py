"""Which token follows from logits: the likeliest, or one that is drawn; and logits that none follows from.

n rows that decode at the moment, H hidden, V vocabulary, C tokens of a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from mirage_ds.errors import UserError

# C; random numbers that a row draws at a time; candidates that are enough for most top_p.
PART, DRAWS, FEW = 512, 64, 1024


class Turn(NamedTuple):
    """Whose token is chosen.

    Attributes:
        row: number of the answer, from 0; step: tokens that it has.
    """

    row: int
    step: int


# (logits (n, V), the turns of the n rows) → (n,) token ids. The logits may be changed.
Chooser = Callable[[torch.Tensor, Sequence[Turn]], torch.Tensor]


class NotFinite(UserError):
    """Logits that no token can be chosen from.

    Attributes:
        row: the record's place in its file, from 0.
    """

    def __init__(self, row: int):
        super().__init__(
            f"the logits of record {row + 1} are not finite: a weight is NaN, or a number became too large for its "
            "dtype; take an earlier checkpoint, or copy the model again"
        )
        self.row = row

    def __reduce__(self) -> tuple[type[NotFinite], tuple[int]]:
        # Ranks send it to each other.
        return NotFinite, (self.row,)


def project(hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Compute the logits (n, V) of hidden states (n, H) with the output matrix (V, H)."""
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # Of few rows oneDNN's product takes two thirds of MKL's time, which functional.linear calls.
        return torch.ops.mkldnn._linear_pointwise(hidden, matrix, None, "none", [], "")
    return functional.linear(hidden, matrix)


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Tell whether all of a row's logits (n, V) are finite: (n,). Their sum is, in one walk and no second (n, V)."""
    return logits.sum(dim=-1, dtype=torch.float32).isfinite()


def check_finite(logits: torch.Tensor, rows: Sequence[int] | torch.Tensor) -> None:
    """Refuse logits (n, V) that are not finite; NotFinite names the first of the n rows that has some."""
    found = finite(logits).tolist()
    if not all(found):
        raise NotFinite(int(rows[found.index(False)]))


def greedy(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
    """Choose the likeliest token of each row."""
    del turns
    # The first of equals, as argmax has it, which takes twice the time or more on a CPU.
    return logits.max(dim=-1).indices


def sampler(temperature: float, top_p: float, seeds: Sequence[int] | Mapping[int, int]) -> Chooser:
    """Make a chooser that samples from the smallest set of tokens that holds `top_p` of the probability.

    A row has a generator of its own on the device of the logits, and one number of it decides a token: nothing depends
    on who is beside it. The set is walked through in the order of the vocabulary, not of the probabilities, in which
    rounding alone would let two tokens change places.

    Args:
        seeds: of the answers, by their numbers.
    """
    drawn: dict[int, tuple[torch.Generator, torch.Tensor]] = {}

    def draw(turn: Turn, device: torch.device) -> torch.Tensor:
        if not turn.step % DRAWS:
            generator = drawn[turn.row][0] if turn.step else torch.Generator(device).manual_seed(seeds[turn.row])
            drawn[turn.row] = generator, torch.rand(DRAWS, generator=generator, dtype=torch.float64, device=device)
        return drawn[turn.row][1][turn.step % DRAWS]

    def choose(logits: torch.Tensor, turns: Sequence[Turn]) -> torch.Tensor:
        numbers = torch.stack([draw(turn, logits.device) for turn in turns])
        for left in drawn.keys() - {turn.row for turn in turns}:
            del drawn[left]
        # The largest becomes 0: at the lowest temperature nothing overflows.
        below = logits.float() - logits.max(-1, keepdim=True).values
        return _at(_kept((below / temperature).softmax(-1), top_p), numbers)

    return choose


def _kept(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set to 0 what is not among the likeliest tokens that hold `top_p`; one as likely as the last of them is."""
    if top_p >= 1:
        return probabilities
    falling = probabilities.topk(min(FEW, probabilities.shape[-1])).values
    # Of a GPU the host would have to wait.
    if probabilities.is_cuda or bool((falling.sum(-1) < top_p).any()):
        falling = probabilities.sort(dim=-1, descending=True).values
    # The token that crosses top_p is still in; what comes after it is out.
    inside = (falling.cumsum(-1) - falling < top_p).sum(-1, keepdim=True)
    least = falling.gather(-1, (inside - 1).clamp(min=0))
    return probabilities.masked_fill(probabilities < least, 0)


def _at(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the token in whose share of a row's weights (n, V) its number (n,), of [0, 1), falls: (n,)."""
    parts = functional.pad(weights, (0, -weights.shape[-1] % PART)).unflatten(-1, (-1, PART))

    def find(shares: torch.Tensor, aim: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which share (n, …) `aim` (n, 1) falls into, and how far."""
        ends = shares.cumsum(-1)
        # Rounding must not lead behind the last share that is not 0.
        aim = torch.minimum(aim, ends[:, -1:] * (1 - 1e-12))
        place = torch.searchsorted(ends, aim, right=True)
        return place, aim - (ends - shares).gather(1, place)

    sums = parts.sum(-1, dtype=torch.float64)
    part, rest = find(sums, numbers[:, None] * sums.sum(-1, keepdim=True))
    within = parts.gather(1, part[..., None].expand(-1, 1, PART))[:, 0].double()
    place, _ = find(within, rest)
    return (part * PART + place)[:, 0]
