"""What the head tells of sampled tokens: log-probabilities and entropies, and their gradients.

M labelled positions, V vocabulary, H hidden, R rows trained in place of others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from mirage_ds.model.loss import LossHead

M, V, H = 23, 40, 16


def make(rows: bool, dtype: torch.dtype, chunk: int) -> tuple[LossHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(V, H).to(dtype), requires_grad=not rows)
    own = (torch.nn.Parameter(torch.randn(2, H)), torch.tensor([3, 7])) if rows else (None, None)
    head = LossHead(weight, 2 * 4 * V * chunk, *own)
    targets = torch.randint(0, V, (M,))
    targets[:2] = torch.tensor([3, 7])
    return head, torch.randn(M, H).to(dtype).requires_grad_(), targets


def plain(head: LossHead, states: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[Any, Any]:
    """The whole logits at once, by torch in float64."""
    weight = head.weight
    if head.rows is not None:
        weight = weight.index_copy(0, head.row_ids, head.rows)
    found = torch.distributions.Categorical(logits=functional.linear(states, weight) / temperature)
    return found.log_prob(targets), found.entropy()


@pytest.mark.parametrize("wanted", ["both", "logp", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_scores_and_gradients_are_torchs_own(rows: bool, dtype: torch.dtype, temperature: float, wanted: str) -> None:
    found = []
    for compute in (plain, lambda head, *given: head(*given[:2], temperature=given[2])):
        # Chunks of 5: several, the last one shorter.
        head, states, targets = make(rows, dtype, 5)
        if compute is plain:
            head, states = head.double(), states.detach().double().requires_grad_()
        logp, entropy = compute(head, states, targets, temperature)
        # Any function of the two: each position's gradient is another.
        loss = (logp.exp() * torch.arange(M)).sum() * (wanted != "entropy")
        loss = loss + (entropy.square() * torch.linspace(-1, 1, M)).sum() if wanted != "logp" else loss
        loss.backward()
        grads = [states.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
        found.append([logp.detach(), entropy.detach(), *(one.float() for one in grads)])
    for wanted_one, one in zip(*found, strict=True):
        assert float((one - wanted_one).norm() / wanted_one.norm()) <= (1e-5 if dtype == torch.float32 else 4e-3)


def test_nothing_of_size_positions_by_vocabulary_is_held_between_forward_and_backward() -> None:
    head, states, targets = make(False, torch.float32, 5)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head(states, targets, temperature=0.7)
    assert max(sizes) == M * H
