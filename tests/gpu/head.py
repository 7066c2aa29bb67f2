"""The loss head's weight gradient in bf16 against float64, on any device.

M labelled positions, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mirage_ds.model.loss import LossHead


class Errors(NamedTuple):
    """Relative to the gradient in float64: the head's, and that of one product whose slopes and result are bf16."""

    found: float
    whole: float


def weight_errors(device: str, rows: int, positions: int = 1480, vocabulary: int = 512, hidden: int = 64) -> Errors:
    """Compute both; the head takes `rows` positions at a time, as far as its tiles allow."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden).to(device, torch.bfloat16))
    states = torch.randn(positions, hidden).to(device, torch.bfloat16)
    targets, scales = torch.randint(0, vocabulary, (positions,)).to(device), torch.rand(positions).to(device)
    head = LossHead(weight, 2 * 4 * vocabulary * rows)
    head(states.requires_grad_(), targets, scales)[0].backward()
    exact, wide = states.detach().double(), weight.detach().double()
    slope = torch.softmax(exact @ wide.t(), dim=1)
    slope[torch.arange(positions, device=device), targets] -= 1
    slope *= scales[:, None].double()
    wanted, once = slope.t() @ exact, slope.bfloat16().double().t() @ exact
    return Errors(*(float((one.double() - wanted).norm() / wanted.norm()) for one in (weight.grad, once.bfloat16())))
