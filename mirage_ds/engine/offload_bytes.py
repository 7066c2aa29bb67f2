"""What offloading to the host's memory and to NVMe takes there, in bytes: DeepSpeed's own sizes, as arithmetic.

W ranks; n elements of a parameter, p = ⌈n / W⌉ its part on one rank; b bytes of a weight in the forward, s of a master
weight, moment or offloaded gradient, a of an accumulated gradient.

The formulas repeat what DeepSpeed 0.19.8 does: runtime/zero/stage3.py, runtime/swap_tensor/. Where they leave something
out they count too little, so that nothing is refused that could run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Smaller tensors are never swapped, and files are whole multiples of this a thread (swap_tensor/utils.py).
SWAPPED_BYTES, ALIGNED_BYTES = 1 << 20, 1 << 10
# AdamW's states of a weight: master weight and two moments. They and the gradient need a buffer each.
STATES = 3


class Keys(NamedTuple):
    """What a resolved JSON says about offloading, with DeepSpeed's defaults where it says nothing.

    Attributes:
        stage: of ZeRO.
        param, optimizer: "none", "cpu" or "nvme".
        param_path, optimizer_path: nvme_path of each, where it is on NVMe.
        buffers, buffer_size, max_in_cpu: of offload_param; the latter two in elements.
        state_buffers: buffer_count of offload_optimizer.
        ahead: how many of pipeline_read and pipeline_write are on.
        fast_init: of offload_optimizer.
        sub_group: sub_group_size, in elements.
        prefetch, live, reuse, persistence: stage3_prefetch_bucket_size, stage3_max_live_parameters,
            stage3_max_reuse_distance and stage3_param_persistence_threshold, in elements.
        least_bytes: smaller tensors stay in memory.
        unit: files are whole multiples of so many bytes.
        weight, state, sum: b, s and a.
    """

    stage: int
    param: str
    optimizer: str
    param_path: Path | None
    optimizer_path: Path | None
    buffers: int
    buffer_size: int
    max_in_cpu: int
    state_buffers: int
    ahead: int
    fast_init: bool
    sub_group: int
    prefetch: int
    live: int
    reuse: int
    persistence: int
    least_bytes: int
    unit: int
    weight: int
    state: int
    sum: int

    @property
    def paths(self) -> list[Path]:
        """The folders that files are swapped to, each once."""
        return list(dict.fromkeys(path for path in (self.param_path, self.optimizer_path) if path is not None))

    def swaps(self, elements: int, width: int) -> bool:
        """Whether a tensor of so many elements is large enough to be swapped."""
        return elements * width >= self.least_bytes

    def in_file(self, elements: int, width: int) -> int:
        """Bytes of a tensor's file."""
        return -(-elements * width // self.unit) * self.unit


def read_keys(values: Mapping[str, Any]) -> Keys:
    """Read the keys of a resolved JSON that DeepSpeed has accepted (setup.check_ds_config)."""
    zero, aio = values.get("zero_optimization", {}), values.get("aio") or {}
    param, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}
    bf16 = values.get("bf16", {})
    weight = 2 if bf16.get("enabled") else 4
    sums = (values.get("data_types") or {}).get("grad_accum_dtype")
    devices = [block.get("device", "none") for block in (param, optimizer)]
    paths = [
        Path(block["nvme_path"]) if device == "nvme" and block.get("nvme_path") else None
        for block, device in zip((param, optimizer), devices, strict=True)
    ]
    return Keys(
        stage=int(zero.get("stage", 0)),
        param=devices[0],
        optimizer=devices[1],
        param_path=paths[0],
        optimizer_path=paths[1],
        buffers=int(param.get("buffer_count", 5)),
        buffer_size=int(param.get("buffer_size", 1e8)),
        max_in_cpu=int(param.get("max_in_cpu", 1e9)),
        state_buffers=int(optimizer.get("buffer_count", 4)),
        ahead=bool(optimizer.get("pipeline_read")) + bool(optimizer.get("pipeline_write")),
        fast_init=bool(optimizer.get("fast_init")),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
        reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
        persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        least_bytes=max(SWAPPED_BYTES, int(aio.get("block_size", 1 << 20))),
        unit=ALIGNED_BYTES * int(aio.get("intra_op_parallelism", 1)),
        weight=weight,
        state=2 if bf16.get("enabled") and bf16.get("bf16_master_weights_and_grads") else 4,
        sum={"fp32": 4, "bf16": 2, "fp16": 2}.get(str(sums), weight),
    )


def part(elements: int, ranks: int) -> int:
    """Elements of a parameter that one rank holds, padding included."""
    return -(-elements // ranks)


def sub_groups(group: Sequence[int], limit: int, ranks: int) -> list[list[int]]:
    """Split an optimizer group into the sub-groups whose states are swapped and stepped together.

    stage3.py, `_create_fp16_sub_groups`.

    Args:
        group: elements of its parameters, in their order.
        limit: sub_group_size.

    Returns:
        The elements (whole, not the rank's part) of each sub-group's parameters.
    """
    if limit >= sum(part(n, ranks) for n in group):
        return [list(group)] if group else []
    found: list[list[int]] = [[]]
    for elements in group:
        if sum(part(n, ranks) for n in found[-1]) >= limit:
            found.append([])
        found[-1].append(elements)
    return found


class Files(NamedTuple):
    """Bytes that one rank keeps on NVMe."""

    weights: int
    states: int
    gradients: int

    @property
    def optimizer(self) -> int:
        """What is in offload_optimizer's folder."""
        return self.states + self.gradients


def files_of(keys: Keys, groups: Sequence[Sequence[int]], ranks: int) -> Files:
    """Count the files of one rank: b a weight, 3 s of states and s of the gradient, without what is too small to swap.

    Args:
        groups: elements of the parameters of each optimizer group (setup.weight_decay_groups).
    """
    weights = states = gradients = 0
    for elements in (n for group in groups for n in group):
        own = part(elements, ranks)
        if keys.param == "nvme" and keys.swaps(own, keys.weight):
            weights += keys.in_file(own, keys.weight)
    for one in swapped_groups(keys, groups, ranks):
        states += STATES * keys.in_file(sum(part(n, ranks) for n in one), keys.state)
        for own in (part(n, ranks) for n in one):
            if keys.swaps(own, keys.state):
                # What is behind the last whole unit stays in memory.
                gradients += own * keys.state // keys.unit * keys.unit
    return Files(weights, states, gradients)


def swapped_groups(keys: Keys, groups: Sequence[Sequence[int]], ranks: int) -> Iterator[list[int]]:
    """Yield the sub-groups whose states lie on NVMe, as lists of their parameters' elements."""
    for one in (one for group in groups for one in sub_groups(group, keys.sub_group, ranks)):
        if keys.optimizer == "nvme" and keys.swaps(sum(part(n, ranks) for n in one), keys.state):
            yield one


class HostMemory(NamedTuple):
    """Bytes that offloading takes of the host's memory for one rank, at least; `locked` of them page-locked."""

    total: int
    locked: int


def memory_of(keys: Keys, groups: Sequence[Sequence[int]], ranks: int) -> HostMemory:
    """Count the host memory of one rank.

    Parameters on the CPU: b. Optimizer offloaded, to whichever device: a, since gradients are accumulated in the host's
    memory. Optimizer on the CPU: 3 s and the gradient that it steps with. NVMe: its buffers, page-locked: buffer_count
    of buffer_size for the weights, a copy of the largest sub-group's *whole* weights to write updated ones from
    (DeepSpeed takes the elements of the parameters there, not of the rank's parts), and buffer_count of the largest
    sub-group for the states.
    """
    subs = [one for group in groups for one in sub_groups(group, keys.sub_group, ranks)]
    own = [sum(part(n, ranks) for n in one) for one in subs]
    total = locked = 0
    if keys.param == "cpu":
        total += keys.weight * sum(own)
    if keys.param == "nvme":
        locked += keys.buffers * keys.in_file(keys.buffer_size, keys.weight)
        if keys.max_in_cpu < sum(own):
            largest = subs[own.index(max(own))]
            locked += sum(keys.in_file(n, keys.weight) for n in largest)
    if keys.optimizer != "none":
        total += keys.sum * sum(own)
    if keys.optimizer == "cpu":
        total += STATES * keys.state * sum(own)
        if keys.stage == 3:
            total += keys.state * sum(own)
    if keys.optimizer == "nvme" and own:
        locked += keys.state_buffers * keys.in_file(max(own), keys.state)
    return HostMemory(total + locked, locked)
