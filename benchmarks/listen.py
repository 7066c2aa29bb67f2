"""Listen to what DeepSpeed gathers and reduces, micro-step by micro-step, on one rank.

Counts of elements, not of seconds: they are the same on any device. L decoder layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass
class Heard:
    """What one rank saw.

    Attributes:
        elements, calls: (micro-step, kind) → elements that travelled, collectives. Kinds: gathered among "all ranks",
            in the "node" (hpZ's groups), in the optimizer's "step"; gradients "reduced".
        layers: (micro-step) → most decoder layers of which any matrix was whole at one time, as ZeRO-3 sees it.
        recorded: micro-steps in which ZeRO-3 recorded the order of the parameters.
        now: the micro-step, from 0; evaluations count as some.
    """

    elements: Counter[tuple[int, str]] = field(default_factory=Counter)
    calls: Counter[tuple[int, str]] = field(default_factory=Counter)
    layers: Counter[int] = field(default_factory=Counter)
    recorded: list[int] = field(default_factory=list)
    now: int = -1

    def gathered(self, micro_step: int) -> int:
        """Elements gathered in a micro-step, wherever, without the optimizer's step."""
        return self.elements[micro_step, "all ranks"] + self.elements[micro_step, "node"]


# Collectives of DeepSpeed's back end → which argument is whole, before or after, and whether it is gathered.
COLLECTIVES = {
    "all_gather_into_tensor": ("output_tensor", True),
    "reduce_scatter_tensor": ("input_tensor", False),
    "all_reduce": ("tensor", False),
}


@contextmanager
def listening(engine: Any) -> Iterator[Heard]:
    """Count while it lasts, by wrapping the collectives of DeepSpeed's back end."""
    from deepspeed import comm
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import groups

    heard = Heard()
    module, take, stepping = engine.module, engine.step, False
    layers = [[p for p in layer.parameters() if len(getattr(p, "ds_shape", ())) > 1] for layer in _layers(module)]

    def counted(name: str) -> Callable[..., Any]:
        run, (whole, gathers) = getattr(comm.comm.cdb, name), COLLECTIVES[name]

        def collective(*arguments: Any, **named: Any) -> Any:
            tensor = named[whole] if whole in named else arguments[0]
            # Norms and flags are single numbers.
            if tensor.numel() > 1:
                group = named.get("group")
                inside = group is not None and group is groups._get_zero_param_intra_parallel_group()
                kind = ("step" if stepping else "node" if inside else "all ranks") if gathers else "reduced"
                heard.elements[heard.now, kind] += tensor.numel()
                heard.calls[heard.now, kind] += 1
            look()
            return run(*arguments, **named)

        return collective

    def look() -> None:
        whole = sum(any(p.ds_status != ZeroParamStatus.NOT_AVAILABLE for p in layer) for layer in layers)
        heard.layers[heard.now] = max(heard.layers[heard.now], whole)

    def step(*arguments: Any) -> None:
        nonlocal stepping
        stepping = True
        take(*arguments)
        stepping = False

    def next_micro_step(*_: Any) -> None:
        heard.now += 1

    def recorded(*_: Any) -> None:
        zero3 = getattr(engine.optimizer, "parameter_offload", None)
        if zero3 is not None and zero3.get_param_coordinator().is_record_trace():
            heard.recorded.append(heard.now)

    # Before DeepSpeed's own hook, which starts to gather; and after its own, which starts the trace.
    hooks = [module.register_forward_pre_hook(next_micro_step, prepend=True), module.register_forward_hook(recorded)]
    with ExitStack() as patched:
        for name in COLLECTIVES:
            patched.enter_context(mock.patch.object(comm.comm.cdb, name, counted(name)))
        patched.enter_context(mock.patch.object(engine, "step", step))
        yield heard
    for hook in hooks:
        hook.remove()


def _layers(module: Any) -> list[Any]:
    return list(module.language_model.layers)
