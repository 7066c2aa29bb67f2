"""The decoder's layers as the passes call them: transformers computes, and each weight gradient is made once.

T tokens of a pass, I inputs and O outputs of a linear layer.

Two things are expensive when a layer runs once a pass. DeepSpeed hooks each of a layer's twelve modules in every pass.
And autograd gives each weight a gradient of its full size in every pass, the last of them in the first pass's backward,
so that the whole gradients of all layers are held until then. So each layer is called through one module of its own
(LayerCall), and linear layers of the passes after the first leave their weight's gradient to the first pass: they keep
inputs and output gradients of their few tokens (Deposits), which the first pass's backward adds as one product.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mirage_ds.model.kernels import use_liger

# What a pass does about the gradients of a layer's weights: makes them; makes them and adds what later passes have
# left; leaves them to the first.
Body = Literal["alone", "first", "later"]


class Round:
    """One forward with its backward.

    Attributes:
        number: counts the forwards; later: passes after the first whose weight gradients are left to it.
        waiting: deposits that no first pass has taken yet.
    """

    def __init__(self) -> None:
        self.number = self.later = self.waiting = 0

    def begin(self, later: int) -> None:
        """Begin a forward; every deposit of the one before has to be taken."""
        self.check()
        self.number += 1
        self.later = later

    def check(self) -> None:
        """Raise RuntimeError if a weight's gradient lacks what later passes have left to it."""
        if self.waiting:
            raise RuntimeError(f"{self.waiting} parts of weight gradients were left to a first pass that has not run")


class Deposits:
    """What later passes leave to the weight gradient of one linear layer."""

    def __init__(self, current: Round):
        self.round = current
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._taken = 0

    def leave(self, inputs: torch.Tensor, slope: torch.Tensor) -> None:
        """Keep a pass's inputs (T, I) and output gradients (T, O)."""
        if self._taken == self.round.number:
            raise RuntimeError("a later pass's backward ran after the first's: a weight's gradient would miss its part")
        self._kept.append((inputs, slope))
        self.round.waiting += 1

    def add_to(self, by_weight: torch.Tensor, by_bias: torch.Tensor | None) -> None:
        """Add all that was left to the first pass's gradients (O, I) and (O,), in place."""
        if len(self._kept) != self.round.later:
            raise RuntimeError(f"{len(self._kept)} of {self.round.later} later passes have left their weight gradient")
        self._taken = self.round.number
        self.round.waiting -= len(self._kept)
        kept, self._kept = self._kept, []
        inputs, slope = (torch.cat(some) for some in zip(*kept, strict=True))
        by_weight.addmm_(slope.t(), inputs)
        if by_bias is not None:
            by_bias += slope.sum(0)


class _Linear(torch.autograd.Function):
    """A linear layer of one of several passes.

    The weight is read again in backward, not saved: under ZeRO-3 a saved one would stay gathered. Only the first pass
    gives weight and bias as inputs: there alone they get a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, layer: "PassLinear"
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows)
        ctx.layer, ctx.first = layer, weight is not None
        return functional.linear(rows, layer.weight, layer.bias).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inputs,), layer, rows = ctx.saved_tensors, ctx.layer, slope.flatten(0, -2)
        by_weight = by_x = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = (rows @ layer.weight.to(rows.dtype)).to(inputs.dtype).unflatten(0, slope.shape[:-1])
        # Under torch_autocast the product was in bf16, and so are those of its gradients.
        inputs = inputs.to(rows.dtype)
        if ctx.first:
            by_weight = rows.t() @ inputs
            by_bias = None if layer.bias is None else rows.sum(0)
            layer.deposits.add_to(by_weight, by_bias)
            by_weight = by_weight.to(layer.weight.dtype)
            by_bias = None if by_bias is None else by_bias.to(layer.bias.dtype)
        elif layer.weight.requires_grad:
            layer.deposits.leave(inputs, rows)
        return by_x, by_weight, by_bias, None


class PassLinear(nn.Linear):
    """A linear layer of one of several passes, around the parameters of another."""

    def __init__(self, linear: nn.Linear, deposits: Deposits, first: bool):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.deposits, self.first = deposits, first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply (…, T, I) into (…, T, O)."""
        if self.first and not self.weight.requires_grad:
            return super().forward(x)
        own = (self.weight, self.bias) if self.first else (None, None)
        return _Linear.apply(x, *own, self)


def _around_same_parameters(layer: nn.Module) -> nn.Module:
    """Copy a layer's modules, but neither its parameters nor its configuration."""
    shared = [*layer.parameters(), *(module.config for module in layer.modules() if hasattr(module, "config"))]
    return copy.deepcopy(layer, {id(one): one for one in shared})


class LayerCall(nn.Module):
    """One decoder layer: a module that DeepSpeed hooks, without parameters of its own, so that no name changes.

    Attributes:
        bodies: the layer's copy that each kind of pass runs.
    """

    def __init__(self, layer: nn.Module, current: Round, kernels: str | None = None):
        super().__init__()
        # In a dictionary: a module that is found in the tree would be hooked, and named a second time.
        self.bodies = {body: _around_same_parameters(layer) for body in get_args(Body)}
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                parent, _, last = name.rpartition(".")
                deposits = Deposits(current)
                for body in ("first", "later"):
                    made = PassLinear(module, deposits, body == "first")
                    setattr(self.bodies[body].get_submodule(parent), last, made)
        if kernels is not None:
            for own in self.bodies.values():
                use_liger(own)

    def train(self, mode: bool = True) -> "LayerCall":
        """Set the mode of all bodies too."""
        for body in self.bodies.values():
            body.train(mode)
        return super().train(mode)

    def forward(self, x: torch.Tensor, body: Body, **arguments: Any) -> torch.Tensor:
        """Run the layer over (1, T, H).

        Args:
            body: what the pass does about the weights' gradients.
            arguments: of transformers' layer.
        """
        output: torch.Tensor = self.bodies[body](x, **arguments)
        return output


class DecoderLayers(nn.Module):
    """The decoder's layers as run_passes calls them.

    Attributes:
        calls: one LayerCall a layer; round: this forward's.
        resident: tells whether all parameters of the layers are whole and stay so until the step's end, so that hooks
            have nothing to gather. The engine sets it (engine/setup.py); without ZeRO-3 they always are.
    """

    def __init__(self, layers: Sequence[nn.Module], kernels: str | None = None):
        super().__init__()
        self.round = Round()
        self.calls = nn.ModuleList(LayerCall(layer, self.round, kernels) for layer in layers)
        self.resident: Callable[[], bool] = lambda: True
        linear = [one for one in layers[0].modules() if isinstance(one, nn.Linear) and one.weight.requires_grad]
        self._trained = [(one.in_features, one.out_features) for one in linear]
        self._parameters_of = tuple(tuple(layer.parameters()) for layer in layers)

    def defers_more_than_gradients(self, tokens: int) -> bool:
        """Tell whether what `tokens` of a later pass leave to the first is more than the gradients that it is for.

        Of a layer with I inputs and O outputs that is T (I + O) numbers, and I O.
        """
        kept = tokens * sum(inputs + outputs for inputs, outputs in self._trained)
        return kept > sum(inputs * outputs for inputs, outputs in self._trained)

    def parameters_of_calls(self) -> list[tuple[nn.Module, tuple[nn.Parameter, ...]]]:
        """Return each LayerCall with its layer's parameters, which are not in its own tree."""
        return list(zip(self.calls, self._parameters_of, strict=True))


class _After(torch.autograd.Function):
    """Let the backward of one pass wait for that of the next, also where nothing is fed back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        ctx.like = before.shape, before.dtype, before.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype, device = ctx.like
        return slope, torch.zeros(shape, dtype=dtype, device=device)


class _HandOn(torch.autograd.Function):
    """Gives tensors the gradients that leaves cut from them have got meanwhile, and zeros to parameters behind them."""

    @staticmethod
    def forward(
        ctx: Any, leaves: Sequence[torch.Tensor], others: Sequence[torch.Tensor], *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.leaves, ctx.others = leaves, others
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # What they have got carries every factor of the loss already.
        slopes = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return None, None, *slopes, *map(torch.zeros_like, ctx.others)


class Cut:
    """Where the graph is cut between the last pass, which has a backward of its own, and those before.

    Args:
        others: parameters that the later backward gives zeros to, since it does not reach them.
    """

    def __init__(self, others: Sequence[nn.Parameter] = ()) -> None:
        self._others = others
        self._tensors: list[torch.Tensor] = []
        self._leaves: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a leaf."""
        leaf = tensor.detach().requires_grad_()
        self._tensors.append(tensor)
        self._leaves.append(leaf)
        return leaf

    def root(self) -> torch.Tensor:
        """Return a scalar whose backward goes on where that of the last pass has ended."""
        root: torch.Tensor = _HandOn.apply(self._leaves, self._others, *self._tensors, *self._others)
        return root


def after(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return x, whose backward runs before that of `before`, which gets a gradient of zeros from it."""
    return _After.apply(x, before)
