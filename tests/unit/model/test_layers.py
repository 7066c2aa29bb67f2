"""The layers as the passes call them: what later passes leave to the first, and the last pass's own backward.

The oracle is autograd over the layers' own modules, in one graph: test_forward.py compares the whole forward with plain
transformers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import make_nano
from torch import nn

from mirage_ds.model.layers import Deposits, LayerCall, PassLinear, Round


def linear_pair(bias: bool = True) -> tuple[nn.Linear, Round, PassLinear, PassLinear]:
    torch.manual_seed(0)
    linear, current = nn.Linear(6, 6, bias=bias), Round()
    deposits = Deposits(current)
    return linear, current, PassLinear(linear, deposits, True), PassLinear(linear, deposits, False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_gets_one_gradient_for_all_passes(bias: bool, dtype: torch.dtype) -> None:
    linear, current, first, later = linear_pair(bias)
    linear.to(dtype)
    x = torch.randn(1, 7, 6, dtype=dtype)
    seen = []
    linear.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    linear(torch.tanh(linear(torch.tanh(linear(a))))).square().sum().backward()
    wanted = [a.grad, linear.weight.grad, *([linear.bias.grad] if bias else [])]
    linear.zero_grad()
    seen.clear()

    current.begin(2)
    later(torch.tanh(later(torch.tanh(first(b))))).square().sum().backward()
    current.check()
    found = [b.grad, linear.weight.grad, *([linear.bias.grad] if bias else [])]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert len(seen) == 1


def test_a_missing_part_is_an_error_and_so_is_a_late_one() -> None:
    _, current, first, later = linear_pair()
    x = torch.randn(2, 6, requires_grad=True)
    current.begin(2)
    one, other = first(x).sum(), later(x).sum()
    other.backward()
    with pytest.raises(RuntimeError, match="1 of 2 later passes"):
        one.backward()
    with pytest.raises(RuntimeError, match="1 parts of weight gradients"):
        current.check()


def test_a_first_pass_that_does_not_wait_is_an_error() -> None:
    _, current, first, later = linear_pair()
    x = torch.randn(2, 6, requires_grad=True)
    current.begin(1)
    one, early, late = first(x).sum(), later(x).sum(), later(x).sum()
    early.backward()
    one.backward()
    with pytest.raises(RuntimeError, match="ran after the first's"):
        late.backward()


def test_a_call_adds_no_name_and_has_the_layers_own_parameters(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(make_nano(tmp_path / "nano", layers=1))
    layer = model.model.language_model.layers[0]
    call = LayerCall(layer, Round())
    assert not list(call.named_parameters()) + list(call.state_dict()) + list(call.children())
    for body in call._bodies.values():
        names = dict(layer.named_parameters())
        assert {name: id(p) for name, p in body.named_parameters()} == {name: id(p) for name, p in names.items()}
    call.train(False)
    assert not any(module.training for body in call._bodies.values() for module in body.modules())
