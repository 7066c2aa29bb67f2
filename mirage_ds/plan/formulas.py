"""What a training step gathers, reduces and computes, as arithmetic: bounds, not measurements.

Ψ elements of the text model, which ZeRO-3 shards (a frozen tower is outside); W ranks on N nodes of g GPUs; k latents a
block; G micro-steps of an optimizer step; T tokens of one rank's micro-batch; b bytes an element; a, m, s as in
states.py.

Imports no torch. docs/scaling.md works the formulas out and says where each comes from; `python -m benchmarks.volumes`
compares ZeRO-3's volumes with what DeepSpeed gathers. Those of ZeRO-1 and 2 are read in DeepSpeed 0.19.8 and not
counted: ZeRO-2 reduces a bucket by an all-reduce (use_multi_rank_bucket_allreduce, its default), 2 Ψ in every
micro-step, ZeRO-1 and 0 once an optimizer step, and 1 and 2 gather the new weights once.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from mirage_ds.plan.activations import Micro
from mirage_ds.plan.settings import Settings, Zero3
from mirage_ds.plan.shape import Sizes

BF16 = 2
# NCCL's own cost model of a ring with its Simple protocol (src/graph/tuning.cc, v2.18 and later): base, one hop over
# NVLink, one hop over the network.
RING_BASE_S, RING_NVLINK_S, RING_NETWORK_S = 8.4e-6, 3.4e-6, 14e-6


class Walk(NamedTuple):
    """How often a forward walks the decoder layers.

    Attributes:
        passes: walks.
        thin: those among them that run one token a row (the latents but the last of each block).
        split: the last pass has a backward of its own, so that gradients of layers are reduced twice.
    """

    passes: int
    thin: int
    split: bool = False


def walk(stage: str, k: int, runs: int = 1) -> Walk:
    """Walks of a stage with `runs` latent blocks of k latents in a row: stage2 runs · k + 1, the others one."""
    return Walk(runs * k + 1, runs * (k - 1)) if stage == "stage2" else Walk(1, 0)


class Volume(NamedTuple):
    """Elements that one micro-step moves, at most.

    Attributes:
        forward, backward: gathered; every rank ends with all of them.
        reduced: gradients reduce-scattered.
    """

    forward: int
    backward: int
    reduced: int

    @property
    def gathered(self) -> int:
        """Gathered in forward and backward."""
        return self.forward + self.backward


def volume(model: Sizes, walked: Walk, zero: Zero3) -> Volume:
    """Elements of one micro-step with checkpointed layers, from the second micro-step on (the first records the order).

    Kept by the limits: each matrix is gathered once; by persistence: none (traffic counts them). Released: each pass
    gathers each layer in the forward, and in backward once more for its recomputation, which the layer's gradient then
    uses too unless `reuse` is too short for that. A bound from above: the last layers of the forward are still there
    when backward begins.
    """
    outside = sum(m for m in (model.embedding, model.head) if m > zero.persistence)
    layers = model.layers * sum(m for m in model.matrices if m > zero.persistence)
    reduced = model.text + walked.split * model.layers * (model.layer + model.vectors)
    if zero.keeps(model):
        return Volume(layers + outside, 0, reduced)
    again = model.layers * _gathered_again(model.matrices, zero)
    if not model.head:  # a tied matrix is gathered as embedding and as head
        outside *= 2
    return Volume(walked.passes * layers + outside, walked.passes * (layers + again) + outside, reduced)


def _gathered_again(matrices: Sequence[int], zero: Zero3) -> int:
    """Elements of a layer that are released between their recomputation and their gradient.

    DeepSpeed keeps a matrix that is used again within `reuse` elements: from its recomputation on, the walk goes to the
    end of the layer and back. The last one is never released: the recomputation stops once it has been reached.
    """
    return sum(
        size
        for i, size in enumerate(matrices[:-1])
        if size > zero.persistence and 2 * sum(matrices[i + 1 :]) >= zero.reuse
    )


def gather_calls(model: Sizes, walked: Walk, zero: Zero3) -> int:
    """Estimate the gathers (collective calls) of one micro-step: prefetching joins matrices until it has `prefetch`.

    More of them where `max_live` leaves prefetching little room, fewer where the end of the forward is still there.
    """
    head = model.head or (0 if zero.keeps(model) else model.embedding)
    passes = 1 if zero.keeps(model) else walked.passes
    walk = [model.embedding, *chain(*[model.matrices] * (model.layers * passes)), head]
    forward = _joined([size for size in walk if size > zero.persistence], zero.prefetch)
    return forward if zero.keeps(model) else 2 * forward


def _joined(matrices: Sequence[int], bucket: int) -> int:
    calls, waiting = 0, 0
    for size in matrices:
        waiting += size
        if waiting >= bucket:
            calls, waiting = calls + 1, 0
    return calls + (waiting > 0)


class Traffic(NamedTuple):
    """What one optimizer step moves, in elements and collective calls.

    Attributes:
        everywhere: gathered or reduced among all ranks; calls likewise.
        in_node: gathered inside each node (hpZ).
    """

    everywhere: int
    everywhere_calls: int
    in_node: int
    in_node_calls: int


def traffic(model: Sizes, walked: Walk, zero: Zero3, ranks: int, micro_steps: int = 1) -> Traffic:
    """Traffic of one optimizer step of G micro-steps.

    Gradients are reduce-scattered among all ranks in every micro-step. Matrices up to `persistence` are gathered once,
    when the optimizer has stepped, each by a call of its own. With hpZ only a weight's first gather in the
    optimizer step is among all ranks; all others, of later micro-steps too, are inside groups of `hpz` ranks.
    """
    if ranks == 1:
        return Traffic(0, 0, 0, 0)
    moved, calls = volume(model, walked, zero), gather_calls(model, walked, zero)
    gathered, gathers = micro_steps * moved.gathered, micro_steps * calls
    reduced, reductions = micro_steps * moved.reduced, micro_steps * math.ceil(moved.reduced / zero.bucket)
    whole = [m for m in (*model.matrices * model.layers, model.embedding, model.head) if 0 < m <= zero.persistence]
    reduced, reductions = reduced + sum(whole), reductions + len(whole)
    if zero.hpz <= 1 or zero.hpz >= ranks:
        return Traffic(gathered + reduced, gathers + reductions, 0, 0)
    first = replace(zero, max_live=model.text, reuse=5 * model.text)
    once, once_calls = volume(model, walked, first).gathered, gather_calls(model, walked, first)
    return Traffic(once + reduced, once_calls + reductions, gathered - once, gathers - once_calls)


class Machine(NamedTuple):
    """A cluster's node, with nominal speeds.

    Attributes:
        name: what the tables call it.
        gpus: of a node.
        flops: dense bf16 FLOP/s of a GPU.
        memory: bytes of a GPU.
        hbm: bytes/s of a GPU's memory.
        nvlink: bytes/s of a GPU in one direction.
        nics: bytes/s of all network adapters of a node together, in one direction.
        pcie: bytes/s between a GPU and its host.
        host: bytes/s of a node's RAM.
    """

    name: str
    gpus: int
    flops: float
    memory: float
    hbm: float
    nvlink: float
    nics: float
    pcie: float = 25e9
    host: float = 200e9


def ring_bytes(elements: float, ranks: int, width: int = BF16) -> float:
    """Bytes that each rank sends and receives in a ring all-gather or reduce-scatter: b · (W − 1) / W an element.

    Patarasuk and Yuan, doi 10.1016/j.jpdc.2008.09.002. Where the rings cross nodes, all network adapters of a node
    together carry the same number: each ring enters and leaves a node once.
    """
    return elements * width * (ranks - 1) / ranks


def ring_latency(nodes: int, gpus: int) -> float:
    """Seconds that a ring all-gather or reduce-scatter takes however little it moves, by NCCL's own cost model."""
    ranks = nodes * gpus
    if ranks == 1:
        return 0.0
    return RING_BASE_S + (ranks - nodes) * RING_NVLINK_S + (nodes - 1) * RING_NETWORK_S


class Network(NamedTuple):
    """Seconds of an optimizer step's collectives, one behind the other.

    Attributes:
        transfer: bytes over the speed of the slowest link of the ring.
        latency: what the calls cost however little they move.
    """

    transfer: float
    latency: float

    @property
    def total(self) -> float:
        """Both."""
        return self.transfer + self.latency


def network(moved: Traffic, machine: Machine, nodes: int, achieved: float = 1.0, width: int = BF16) -> Network:
    """Time of an optimizer step's collectives.

    Args:
        achieved: share of the nominal link speeds that collectives reach.
    """
    gpus = machine.gpus
    slowest = min(machine.nvlink, machine.nics) if nodes > 1 else machine.nvlink
    transfer = ring_bytes(moved.everywhere, nodes * gpus, width) / slowest
    transfer += ring_bytes(moved.in_node, gpus, width) / machine.nvlink
    latency = moved.everywhere_calls * ring_latency(nodes, gpus) + moved.in_node_calls * ring_latency(1, gpus)
    return Network(transfer / achieved, latency)


def flops(model: Sizes, tokens: float, labelled: float = 0, keys: float = 0, checkpointing: bool = True) -> float:
    """Floating-point operations of one micro-step's forward and backward.

    2 a weight and token forward, twice that backward (arXiv 2001.08361, section 2.1), the forward once more where
    layers are recomputed. Of the text model alone: the tower's features are kept on disk; where it runs in a step,
    mirage_ds/plan/mfu.py counts it.

    Args:
        tokens: T.
        labelled: tokens among them that go through the output matrix.
        keys: mean keys that a token attends to; half a row's length.
    """
    per_token = model.layers * (model.layer + 2 * model.width * keys)
    return (4 if checkpointing else 3) * 2 * (per_token * tokens + (model.head or model.embedding) * labelled)


def thin_bytes(model: Sizes, walked: Walk, width: int = BF16, recomputed: bool = False) -> float:
    """Bytes that the passes of one token a row move through a GPU's memory: there the weights' size is what counts.

    Forward, recomputation and backward read the weights; their gradient is made in the first pass's backward.
    """
    return walked.thin * (2 + recomputed) * model.layers * model.layer * width


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
    reduced = volume(model, walked, settings.zero).reduced if settings.stage == 2 else model.text
    calls = times * 2 * math.ceil(reduced / settings.zero.bucket) + math.ceil(gathered / settings.zero.bucket)
    return Traffic(int(times * 2 * wide * reduced) + gathered, calls, 0, 0)


def step_cost(
    micro: Micro, steps: int, settings: Settings, machine: Machine, nodes: int, used: float, achieved: float
) -> Step:
    """Bound one optimizer step; a token sees half a row on the average.

    Args:
        micro: one rank's micro-batch; steps: G of them.
        used: share of the peak FLOP/s; achieved: share of the link speeds.
    """
    model, ranks, b = micro.model, nodes * machine.gpus, settings.compute
    thin_passes = sum(max(one.queries) == 1 for one in micro.passes)
    walked = Walk(len(micro.passes), thin_passes, micro.backwards > 1)
    sent = moved(model, walked, settings, ranks, steps)
    everywhere = ring_bytes(sent.everywhere, ranks, b)
    keys = micro.tokens / micro.rows / 2
    arithmetic = steps * flops(model, micro.tokens, micro.labelled, keys, micro.checkpointing)
    thin = steps * thin_bytes(model, walked, b, micro.checkpointing and not settings.resident(model))
    seconds = {
        "arithmetic": arithmetic / (machine.flops * used),
        "network" if nodes > 1 else "NVLink": network(sent, machine, nodes, achieved, b).total,
    }
    if thin:
        seconds["weights read by one-token passes"] = thin / machine.hbm
    shard = model.text / ranks if settings.stage else model.text
    # AdamW reads weight, gradient and two moments, writes all but the gradient and the weight of the forward.
    touched = shard * (3 * settings.master + 4 * settings.moments + b)
    if settings.offload_optimizer:
        seconds["optimizer on the host"] = machine.gpus * touched / machine.host
        # Each backward's sums go down; from the second on they come up first, are added to, and go down again.
        sums = shard * settings.accumulated * (2 * steps * micro.backwards - 1)
        weights = 0.0 if settings.offload_parameters else shard * b
        seconds["PCIe"] = (sums + weights) / machine.pcie
    else:
        seconds["optimizer"] = touched / machine.hbm
    if settings.offload_parameters:
        gathered = steps * volume(model, walked, settings.zero).gathered / ranks
        seconds["PCIe"] = seconds.get("PCIe", 0.0) + (gathered + shard) * b / machine.pcie
    return Step(
        flops=arithmetic,
        nvlink_bytes=everywhere + ring_bytes(sent.in_node, machine.gpus, b),
        network_bytes=everywhere if nodes > 1 else 0.0,
        seconds=seconds,
    )
