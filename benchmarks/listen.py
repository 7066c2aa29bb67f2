"""Listen to what DeepSpeed's ZeRO-3 gathers and reduces, micro-step by micro-step, on one rank.

Counts of elements, not of seconds: they are the same on any device. L decoder layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass
class Heard:
    """What one rank saw.

    Attributes:
        elements, calls: (micro-step, "all ranks" | "node" | "reduced") → gathered or reduced; "node" is inside hpZ's
            groups.
        began: (micro-step) → passes whose backward had begun when its first gradient was reduced.
        layers: (micro-step) → most decoder layers, not counting persistent parameters, of which any matrix was whole at
            one time in backward.
        recorded: micro-steps in which DeepSpeed recorded the order of the parameters.
        now: the micro-step, from 0; evaluations count as some.
    """

    elements: Counter[tuple[int, str]] = field(default_factory=Counter)
    calls: Counter[tuple[int, str]] = field(default_factory=Counter)
    began: dict[int, int] = field(default_factory=dict)
    layers: Counter[int] = field(default_factory=Counter)
    recorded: list[int] = field(default_factory=list)
    now: int = -1

    def gathered(self, micro_step: int) -> int:
        """Elements gathered in a micro-step, wherever."""
        return self.elements[micro_step, "all ranks"] + self.elements[micro_step, "node"]


@contextmanager
def listening(engine: Any) -> Iterator[Heard]:
    """Count while it lasts, by wrapping the two functions of DeepSpeed that start the collectives."""
    from deepspeed.runtime.zero import partition_parameters as partition
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils import groups

    heard = Heard()
    passes = 0
    module = engine.module
    layers = [[p for p in layer.parameters() if p.dim() > 1 or len(p.ds_shape) > 1] for layer in _layers(module)]
    gather, reduce = partition._dist_allgather_fn, stage3.reduce_scatter_coalesced

    def add(kind: str, number: int) -> None:
        heard.elements[heard.now, kind] += number
        heard.calls[heard.now, kind] += 1

    def counted_gather(part: Any, whole: Any, group: Any = None) -> Any:
        inside = group is not None and group is groups._get_zero_param_intra_parallel_group()
        add("node" if inside else "all ranks", whole.numel())
        if passes:
            look()
        return gather(part, whole, group)

    def counted_reduce(tensors: Any, group: Any = None) -> Any:
        heard.began.setdefault(heard.now, passes)
        add("reduced", sum(tensor.numel() for tensor in tensors))
        return reduce(tensors, group)

    def look(*_: Any) -> None:
        away = partition.ZeroParamStatus.NOT_AVAILABLE
        whole = sum(any(p.ds_status != away and not p.ds_persist for p in layer) for layer in layers)
        heard.layers[heard.now] = max(heard.layers[heard.now], whole)

    def next_micro_step(*_: Any) -> None:
        nonlocal passes
        heard.now, passes = heard.now + 1, 0

    def recorded(*_: Any) -> None:
        if engine.optimizer.parameter_offload.get_param_coordinator().is_record_trace():
            heard.recorded.append(heard.now)

    def next_pass(*_: Any) -> None:
        nonlocal passes
        passes += 1
        look()

    hooks = [
        # Before DeepSpeed's own hook, which starts to gather; and after its own, which starts the trace.
        module.register_forward_pre_hook(next_micro_step, prepend=True),
        module.register_forward_hook(recorded),
        _layers(module)[-1].register_full_backward_pre_hook(next_pass),
    ]
    with (
        mock.patch.object(partition, "_dist_allgather_fn", counted_gather),
        mock.patch.object(stage3, "reduce_scatter_coalesced", counted_reduce),
    ):
        yield heard
    for hook in hooks:
        hook.remove()


def _layers(module: Any) -> list[Any]:
    return list(module.language_model.layers)
