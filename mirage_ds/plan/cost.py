"""What an optimizer step moves and computes, and the seconds each bounds it by.

Ψ elements of the trained parameters, W ranks on N nodes of g GPUs, G micro-steps; b, a, m, s bytes as in states.py.

ZeRO-3's volumes are in formulas.py. ZeRO-1 and 2 are read in DeepSpeed 0.19.8 and not counted: ZeRO-2 reduces a
bucket by an all-reduce (use_multi_rank_bucket_allreduce, its default), 2 Ψ in every micro-step, ZeRO-1 and 0 once an
optimizer step, and 1 and 2 gather the new weights once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mirage_ds.plan.formulas import (
    Machine,
    Sizes,
    Traffic,
    Walk,
    flops,
    network,
    ring_bytes,
    thin_bytes,
    traffic,
    volume,
)
from mirage_ds.plan.settings import Settings


class Host(NamedTuple):
    """Speeds of a node beside its GPUs' own, in bytes/s: pcie of a GPU, memory and nvme of the node."""

    pcie: float
    memory: float
    nvme: float


class Work(NamedTuple):
    """One rank's micro-batch as arithmetic sees it: tokens, labelled among them, mean keys of a token."""

    tokens: int
    labelled: int
    keys: float


class Step(NamedTuple):
    """One optimizer step.

    Attributes:
        flops: of a GPU.
        nvlink_bytes: sent by a GPU inside its node; network_bytes: by a node to others.
        seconds: of each thing that can bound it.
    """

    flops: float
    nvlink_bytes: float
    network_bytes: float
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def least(self) -> float:
        """Seconds if everything else were hidden behind what takes longest."""
        return self.seconds[self.bound]

    @property
    def most(self) -> float:
        """Seconds if nothing were hidden behind anything."""
        return sum(self.seconds.values())


def moved(model: Sizes, walked: Walk, settings: Settings, ranks: int, micro_steps: int) -> Traffic:
    """Elements of the compute dtype that an optimizer step moves."""
    if settings.stage == 3 or ranks == 1:
        return traffic(model, walked, settings.zero, ranks, micro_steps)
    times = micro_steps if settings.stage == 2 else 1
    wide = settings.accumulated / settings.compute if settings.whole_sums else 1
    gathered = model.text if settings.stage else 0
    calls = times * 2 * math.ceil(model.text / settings.zero.bucket) + math.ceil(gathered / settings.zero.bucket)
    return Traffic(int(times * 2 * wide * model.text) + gathered, calls, 0, 0)


def step_cost(
    model: Sizes,
    walked: Walk,
    settings: Settings,
    machine: Machine,
    host: Host,
    work: Work,
    nodes: int,
    micro_steps: int,
    checkpointing: bool,
    used: float,
    achieved: float,
) -> Step:
    """Bound one optimizer step.

    Args:
        used: share of the peak FLOP/s; achieved: share of the link speeds.
    """
    ranks, b = nodes * machine.gpus, settings.compute
    sent = moved(model, walked, settings, ranks, micro_steps)
    everywhere = ring_bytes(sent.everywhere, ranks, b)
    arithmetic = micro_steps * flops(model, work.tokens, work.labelled, work.keys, checkpointing)
    seconds = {
        "arithmetic": arithmetic / (machine.flops * used) + micro_steps * thin_bytes(model, walked, b) / machine.hbm,
        "network" if nodes > 1 else "NVLink": network(sent, machine, nodes, achieved, b).total,
    }
    shard = model.text / ranks if settings.stage else model.text
    # AdamW reads weight, gradient and two moments, writes all but the gradient and the weight of the forward.
    touched = shard * (3 * settings.master + 4 * settings.moments + b)
    if settings.optimizer_on == "none":
        seconds["optimizer"] = touched / machine.hbm
    else:
        seconds["optimizer on the host"] = machine.gpus * touched / host.memory
        # Each micro-step's sums go down; from the second on they come up first, are added to, and go down again.
        lines = shard * settings.accumulated * (2 * micro_steps - 1)
        if settings.parameters_on == "none":
            lines += shard * b
        seconds["PCIe"] = lines / host.pcie
    gathered = micro_steps * volume(model, walked, settings.zero).gathered / ranks
    if settings.parameters_on != "none":
        seconds["PCIe"] = seconds.get("PCIe", 0.0) + (gathered + shard) * b / host.pcie
    disk = 0.0
    if settings.parameters_on == "nvme":
        disk += (gathered + shard) * b
    if settings.optimizer_on == "nvme":
        # Weight and moments are read and written, the gradient is written and read.
        disk += 2 * shard * (2 * settings.master + 2 * settings.moments)
    if disk:
        seconds["local disk"] = machine.gpus * disk / host.nvme
    return Step(
        flops=arithmetic,
        nvlink_bytes=everywhere + ring_bytes(sent.in_node, machine.gpus, b),
        network_bytes=everywhere if nodes > 1 else 0.0,
        seconds=seconds,
    )
