"""What a piece of work does beside its result: values read on the host, kernels launched, memory held.

Each has a form for CUDA and one for the CPU, where the same bodies run without a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its size, the host must wait for; `lift_fresh` is a tensor made of Python's numbers, which
# is copied to its device.
WAITING = frozenset(
    """_local_scalar_dense is_nonzero equal allclose nonzero argwhere masked_select unique_dim unique_consecutive
    unique_dim_consecutive _unique _unique2 bincount repeat_interleave lift_fresh""".split()  # noqa: SIM905
)
# A boolean mask as an index is a nonzero inside one of these.
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
COPIES = frozenset({"_to_copy", "copy_"})
# Launches of the CUDA runtime and driver as the profiler names them, copies and fills among them.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")
# Operators that start no kernel although they make a tensor.
NO_KERNEL = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"})


class HostRead(AssertionError):
    """The host would wait for a value that a device computes."""


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)


class NoHostReads(TorchDispatchMode):
    """Raise at the first operator for which the host would wait, in forward and backward.

    A copy between devices counts: one that is not told `non_blocking` waits. On the CPU itself `tolist` and `numpy` are
    no operators and no copies; on the meta device they are.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, named = func.overloadpacket.__name__, kwargs or {}
        if name in WAITING and not (name == "repeat_interleave" and named.get("output_size") is not None):
            raise HostRead(str(func))
        if name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
            raise HostRead(f"{func} with a boolean mask")
        if name in COPIES and not named.get("non_blocking", False):
            devices = {x.device.type for x in _tensors(args)}
            if named.get("device") is not None:
                devices.add(torch.device(named["device"]).type)
            if len(devices) > 1:
                raise HostRead(f"{func} between {' and '.join(sorted(devices))}")
        return func(*args, **named)


@contextmanager
def no_host_reads(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the device: RuntimeError from torch on CUDA, HostRead elsewhere."""
    if device.type != "cuda":
        with NoHostReads():
            yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Operators(TorchDispatchMode):
    """Counts operators that compute: neither views nor bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        alias = [one.alias_info for one in func._schema.returns]
        views = bool(alias) and all(one is not None and not one.is_write for one in alias)
        if not views and name not in NO_KERNEL:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def launches(device: torch.device, work: Callable[[], Any]) -> Counter[str]:
    """Count what one call of `work` starts: launches of the CUDA runtime by name; on the CPU, operators by name."""
    if device.type != "cuda":
        with _Operators() as counted:
            work()
        return counted.seen
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return launched(event.name for event in seen.events() or ())


def launched(names: Any) -> Counter[str]:
    """Of the events' names those that are launches."""
    return Counter(name for name in names if name.startswith(LAUNCHES))


def height_on_cuda(work: Callable[[], Any]) -> int:
    """Bytes that CUDA's allocator held at most while `work` ran, beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
