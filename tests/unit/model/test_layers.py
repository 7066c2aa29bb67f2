"""The layers as the passes call them: what later passes leave to the first, and the last pass's own backward.

The oracle is autograd over the layers' own modules, in one graph: test_forward.py compares the whole forward with plain
transformers.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import make_nano
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_ds.data.batch import collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.model.kernels import check_device
from mirage_ds.model.layers import Deposits, LayerCall, PassLinear, Round
from mirage_ds.model.load import load_model


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


class LigerRMSNorm(nn.Module):
    """Stands for Liger-Kernel's, which tests/slow/test_liger.py runs."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps


class LigerSwiGLUMLP(nn.Module):
    def __init__(self, config: Any):
        super().__init__()


@pytest.mark.parametrize("kernels", [None, "liger"])
def test_a_call_adds_no_name_and_has_the_layers_own_parameters(
    kernels: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = SimpleNamespace(LigerRMSNorm=LigerRMSNorm, LigerSwiGLUMLP=LigerSwiGLUMLP)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=one))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", one)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(make_nano(tmp_path / "nano", layers=1))
    layer = model.model.language_model.layers[0]
    call = LayerCall(layer, Round(), kernels)
    assert not list(call.named_parameters()) + list(call.state_dict()) + list(call.children())
    for body in call.bodies.values():
        names = dict(layer.named_parameters())
        assert {name: id(p) for name, p in body.named_parameters()} == {name: id(p) for name, p in names.items()}
        fused = [module for module in body.modules() if isinstance(module, LigerRMSNorm | LigerSwiGLUMLP)]
        assert len(fused) == (3 if kernels else 0)
        assert all(one.eps == 1e-6 for one in fused if isinstance(one, LigerRMSNorm))
    assert not any(isinstance(module, LigerRMSNorm | LigerSwiGLUMLP) for module in model.modules())
    call.train(False)
    assert not any(module.training for body in call.bodies.values() for module in body.modules())


class Whole(TorchDispatchMode):
    """Bytes of weight gradients that are alive, and the most at a time: storages made with the shape of a matrix."""

    def __init__(self, shapes: set[tuple[int, ...]]):
        super().__init__()
        self.shapes = shapes
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and tuple(out.shape) in self.shapes and not out._is_view():
            storage = out.untyped_storage()
            if storage._cdata not in {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)}:
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_gradients_of_three_layers_at_most_are_alive(
    checkpointing: bool, split: bool, mixed: Path, tmp_path: Path
) -> None:
    layers, k = 28, 4
    folder = make_nano(tmp_path / "nano", layers)
    encoder = load_encoder([str(folder)], ImageFinder.beside(mixed, None), "stage2", k)
    loaded = load_model(
        folder,
        stage="stage2",
        dtype=torch.float32,
        device=torch.device("cpu"),
        checkpointing=checkpointing,
        split=split,
    )
    rows = [encoder.encode(record, row) for row, record in enumerate(scan(mixed)[0][:2])]
    assert loaded.tower is not None
    batch = loaded.tower.attach(collate(rows, k + 1, encoder.dummy(1)))
    matrices = [p for p in loaded.model.language_model.layers[0].parameters() if p.dim() == 2]
    shapes = {tuple(p.shape) for p in matrices}
    # No other tensor has the shape of a matrix.
    assert not {len(batch.input_ids), *(len(one.tokens) for one in batch.passes)} & {n for pair in shapes for n in pair}
    for p in loaded.model.parameters():
        # As ZeRO does: a gradient goes away as soon as it is complete.
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Whole(shapes) as whole:
        sums = loaded.model(batch)
        sums.ce.backward()
        assert (sums.earlier is not None) == split
        if split:
            sums.earlier.backward()
    layer = sum(p.numel() * p.element_size() for p in matrices)
    assert layer / 7 < whole.most <= 3 * layer


def test_kernels_are_refused_without_a_gpu() -> None:
    check_device(None, torch.device("cpu"))
    check_device("liger", torch.device("cuda"))
    with pytest.raises(UserError, match=r"^--kernels liger needs a CUDA GPU and this run is on cpu; leave it out$"):
        check_device("liger", torch.device("cpu"))
