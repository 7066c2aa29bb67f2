"""A step under torch's profiler, reduced to a table: where its seconds go, and how long the device was idle."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

# Parts of the names of CUDA's kernels, and of operators where the CPU computes; the first kind that fits is taken.
# Flash kernels have cutlass in their names too.
KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "aten::addmm", "aten::bmm"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "collectives": ("nccl", "c10d", "gloo"),
    "copies": ("memcpy", "memset", "copy", "cat", "index", "gather", "aten::fill_", "aten::zero_"),
}
OTHERS = "elementwise and others"
# Kernels or operators that are named.
NAMED = 12
Span = tuple[str, float, float]


def kind_of(name: str) -> str:
    """Return the kind of work that a kernel or operator does."""
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), OTHERS)


def covered(spans: Iterable[Span]) -> float:
    """Return how much of the time is covered by (name, start, end), which may overlap."""
    total, until = 0.0, -1.0
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def table(spans: list[Span], busy: float, wall: float) -> dict[str, Any]:
    """Sum spans up by kind, in seconds.

    Args:
        busy: of `wall`, the seconds in which at least one of them ran.
    """
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for name, start, end in spans:
        by_kind[kind_of(name)] += end - start
        by_name[name[:80]] += end - start
    return {
        "wall_s": round(wall, 4),
        "gaps_s": round(wall - busy, 4),
        "seconds": {kind: round(by_kind[kind], 4) for kind in (*KINDS, OTHERS)},
        "largest": {name: round(seconds, 4) for name, seconds in by_name.most_common(NAMED)},
    }


def traced(run: Callable[[], object], cuda: bool) -> dict[str, Any]:
    """Run something under the profiler; return its table, on a GPU with the number of kernels that were started."""
    import torch
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        begun = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - begun
    if not cuda:
        spans = [(one.key, 0.0, one.self_cpu_time_total / 1e6) for one in seen.key_averages()]
        return table(spans, sum(end for _, _, end in spans), wall)
    events: Any = seen.events()
    spans = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    launches = sum(event.name.startswith(("cudaLaunch", "cuLaunch")) for event in events)
    return {**table(spans, covered(spans), wall), "launches": launches}
