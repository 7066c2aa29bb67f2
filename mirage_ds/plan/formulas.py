"""What a training step gathers, reduces and computes, as arithmetic: bounds, not measurements.

Ψ elements of the text model, which ZeRO-3 shards (a frozen tower is outside); W ranks on N nodes of g GPUs; k latents a
block; G micro-steps of an optimizer step; T tokens of one rank's micro-batch; b bytes an element; a, m, s as in
states.py.

Imports no torch. docs/scaling.md works the formulas out and says where each comes from; `python -m benchmarks.volumes`
compares them with what DeepSpeed 0.19.8 gathers and reduces. ZeRO-0, 1 and 2 reduce a bucket by an all-reduce, which
moves each element twice: ZeRO-2 in every backward, 0 and 1 once an optimizer step; 1 and 2 gather the new weights once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from mirage_ds.config.run import passes_of_block
from mirage_ds.plan.activations import Micro
from mirage_ds.plan.host import operators
from mirage_ds.plan.settings import Settings, Zero3
from mirage_ds.plan.shape import Sizes

BF16 = 2
# Of Step.seconds: what works beside the GPU.
HOST = "host"
# NCCL's own cost model of a ring with its Simple protocol (src/graph/tuning.cc, v2.18 and later): base, one hop over
# NVLink, one hop over the network.
RING_BASE_S, RING_NVLINK_S, RING_NETWORK_S = 8.4e-6, 3.4e-6, 14e-6


class Walk(NamedTuple):
    """How often a forward walks the decoder layers.

    Attributes:
        passes: walks.
        thin: those among them that run one token a row (the latents but the last of each block).
        split: the last walk has a backward of its own (activations.splits).
    """

    passes: int
    thin: int
    split: bool = False


def walk(stage: str, k: int, runs: int = 1, latent_passes: int | None = None) -> Walk:
    """Walks of a stage with `runs` latent blocks of k latents in a row: stage2 and rl runs · k + 1, the others one.

    Args:
        latent_passes: T of latents that are made together, runs · min(T, k) + 1, each of several tokens.
    """
    added = runs * passes_of_block(k, latent_passes) if stage in ("stage2", "rl") else 0
    return Walk(added + 1, max(0, added - runs) if latent_passes is None else 0)


class Volume(NamedTuple):
    """Elements that one rank's micro-step moves, at most, and those of the optimizer's step.

    Attributes:
        forward, backward: gathered in a micro-step; every rank ends with all of them.
        reduced: gradients reduced in a micro-step.
        step: gathered once the optimizer has stepped.
    """

    forward: int
    backward: int
    reduced: int
    step: int

    @property
    def gathered(self) -> int:
        """Gathered in forward and backward."""
        return self.forward + self.backward


def volume(model: Sizes, walked: Walk, zero: Zero3, encoder: int = 0) -> Volume:
    """Elements under ZeRO-3 with checkpointed layers, from the second micro-step on (the first records the order).

    What has at most `persistence` elements stays whole and is gathered as the optimizer's step ends: all vectors, and
    all matrices of kept parameters. The others are gathered a layer at a time, in each pass's forward and once more in
    its backward, for recomputation and gradient. A bound from above: the last layers of the forward are still there
    when backward begins. Where the last pass has a backward of its own, a weight that both have is reduced twice: all
    but an embedding and a head that are two matrices.

    Args:
        encoder: elements that alone are trained, where the model is frozen (activations.Micro).
    """
    matrices = sum(m for m in model.matrices if m > zero.persistence)
    ends = [m for m in (model.embedding, model.head or model.embedding) if m > zero.persistence]
    once = model.layers * matrices + sum(ends if model.head else ends[:1])
    drawing = model.hidden**2 if model.drawing and model.hidden**2 > zero.persistence else 0
    gathered = walked.passes * model.layers * matrices + sum(ends) + drawing
    if encoder:
        return Volume(gathered, gathered, encoder, encoder)
    apart = model.text - (model.embedding + model.head if model.head else 0)
    return Volume(gathered, gathered, model.text + (apart if walked.split else 0), model.text - once - drawing)


def gather_calls(model: Sizes, walked: Walk, zero: Zero3) -> int:
    """Estimate the gathers (collective calls) of one micro-step.

    DeepSpeed gathers ahead when a layer begins, and in backward once more when its recomputation begins.
    """
    matrices = [m for m in model.matrices if m > zero.persistence]
    room = min(zero.prefetch, zero.max_live - sum(matrices))
    ends = sum(m > zero.persistence for m in (model.embedding, model.head or model.embedding))
    return walked.passes * model.layers * (_parts(matrices, room, 1) + _parts(matrices, room, 2)) + 2 * ends


def _parts(matrices: Sequence[int], room: int, times: int) -> int:
    """Calls in which a layer comes: `times` times the next matrices that fill `room`, then what is left."""
    left, calls = list(matrices), 0
    for _ in range(times):
        ahead = 0
        while left and ahead < room:
            ahead += left.pop(0)
        calls += ahead > 0
    return calls + bool(left)


def step_calls(model: Sizes, zero: Zero3) -> int:
    """Count the gathers as the optimizer's step ends: one a parameter that stays whole."""
    # Two norms; biases of q, k and v, or norms of the heads' queries and keys. The final norm.
    vectors = model.layers * (4 if model.head_norms else 5) + 1
    matrices = model.layers * sum(m <= zero.persistence for m in model.matrices)
    return vectors + matrices + sum(0 < m <= zero.persistence for m in (model.embedding, model.head))


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


def traffic(model: Sizes, walked: Walk, zero: Zero3, ranks: int, micro_steps: int = 1, encoder: int = 0) -> Traffic:
    """Traffic of one optimizer step of G micro-steps under ZeRO-3.

    Gradients are reduce-scattered among all ranks in every micro-step. With hpZ only a weight's first gather in the
    optimizer step is among all ranks; all others, of later micro-steps too, are inside groups of `hpz` ranks. What
    stays whole is gathered among all ranks.
    """
    if ranks == 1:
        return Traffic(0, 0, 0, 0)
    moved = volume(model, walked, zero, encoder)
    gathered, gathers = micro_steps * moved.gathered, micro_steps * gather_calls(model, walked, zero)
    often = moved.step + micro_steps * moved.reduced
    calls = step_calls(model, zero) + micro_steps * math.ceil(moved.reduced / zero.bucket)
    if zero.hpz <= 1 or zero.hpz >= ranks:
        return Traffic(gathered + often, gathers + calls, 0, 0)
    once, once_calls = model.text - moved.step, gather_calls(model, Walk(1, 0), zero) // 2
    return Traffic(once + often, once_calls + calls, gathered - once, gathers - once_calls)


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
        operator: seconds in which a host issues one.
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
    operator: float = 7e-6


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


def flops(
    model: Sizes,
    tokens: float,
    labelled: float = 0,
    keys: float = 0,
    checkpointing: bool = True,
    frozen: bool = False,
) -> float:
    """Floating-point operations of one micro-step's forward and backward.

    2 a weight and token forward, twice that backward (arXiv 2001.08361, section 2.1), the forward once more where
    layers are recomputed. Of the text model alone: the tower's features are kept on disk; where it runs in a step,
    mirage_ds/plan/mfu.py counts it.

    Args:
        tokens: T.
        labelled: tokens among them that go through the output matrix.
        keys: mean keys that a token attends to; half a row's length.
        frozen: no gradient of a weight is made (scaffold).
    """
    weights = model.layers * model.layer * tokens + (model.head or model.embedding) * labelled
    attention = 2 * model.layers * model.width * keys * tokens
    return 2 * ((4 if checkpointing else 3) * (weights + attention) - frozen * weights)


def thin_bytes(model: Sizes, walked: Walk, width: int = BF16, recomputed: bool = False) -> float:
    """Bytes that the passes of one token a row move through a GPU's memory: there the weights' size is what counts.

    Forward, backward, and recomputation where weights are released, read the weights. Once for all of these passes the
    first pass's backward reads and writes the gradient to add theirs.
    """
    often = walked.thin * (3 if recomputed else 2) + (2 if walked.thin else 0)
    return often * model.layers * model.layer * width


class Step(NamedTuple):
    """One optimizer step.

    Attributes:
        flops: of a GPU.
        nvlink_bytes: sent by a GPU inside its node; network_bytes: by a node to others.
        seconds: of each thing that can bound it.
        operators: that a host issues to a GPU.
    """

    flops: float
    nvlink_bytes: float
    network_bytes: float
    seconds: dict[str, float]
    operators: int

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
        """Seconds if nothing were hidden behind anything but the host behind its GPU, or the GPU behind it."""
        host = self.seconds[HOST]
        return max(host, sum(self.seconds.values()) - host)


def moved(model: Sizes, walked: Walk, settings: Settings, ranks: int, micro_steps: int, encoder: int = 0) -> Traffic:
    """Elements of the compute dtype that an optimizer step moves; `encoder` as in volume."""
    if settings.stage == 3 or ranks == 1:
        return traffic(model, walked, settings.zero, ranks, micro_steps, encoder)
    # Of all-reduces.
    trained = encoder or model.text
    each = volume(model, walked, settings.zero, encoder).reduced
    reduced = 2 * (micro_steps * each if settings.stage == 2 else trained)
    wide = settings.accumulated / settings.compute if settings.whole_sums else 1
    gathered = trained if settings.stage else 0
    calls = math.ceil(reduced / settings.zero.bucket) + math.ceil(gathered / settings.zero.bucket)
    return Traffic(int(wide * reduced) + gathered, calls, 0, 0)


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
    sent = moved(model, walked, settings, ranks, steps, micro.encoder)
    everywhere = ring_bytes(sent.everywhere, ranks, b)
    keys = micro.tokens / micro.rows / 2
    arithmetic = steps * flops(model, micro.tokens, micro.labelled, keys, micro.checkpointing, micro.encoder > 0)
    thin = steps * thin_bytes(model, walked, b, recomputed=micro.checkpointing and not settings.resident(model))
    seconds = {
        "arithmetic": arithmetic / (machine.flops * used),
        "network" if nodes > 1 else "NVLink": network(sent, machine, nodes, achieved, b).total,
    }
    if thin:
        seconds["weights read by one-token passes"] = thin / machine.hbm
    shard = (micro.encoder or model.text) / (ranks if settings.stage else 1)
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
        once = volume(model, walked, settings.zero)
        gathered = (steps * once.gathered + once.step) / ranks
        seconds["PCIe"] = seconds.get("PCIe", 0.0) + (gathered + shard) * b / machine.pcie
    issued = steps * operators(micro, settings)
    seconds[HOST] = issued * machine.operator
    return Step(
        flops=arithmetic,
        nvlink_bytes=everywhere + ring_bytes(sent.in_node, machine.gpus, b),
        network_bytes=everywhere if nodes > 1 else 0.0,
        seconds=seconds,
        operators=issued,
    )
