"""What a training step gathers, reduces, computes and holds, as arithmetic: bounds, not measurements.

Ψ elements of the text model, which ZeRO-3 shards (a frozen tower is outside, see docs/design.md); W ranks on N nodes of
g GPUs; k latents a run; G micro-steps of an optimizer step; T tokens of one rank's micro-batch; b bytes an element.

Imports neither torch nor anything of this project. docs/scaling.md works the
formulas out and says where each comes from; `python -m benchmarks.volumes` compares the volumes with what DeepSpeed
gathers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from mirage_ds.model.shape import Shape

BF16 = 2
# fp32 master weight and AdamW's two moments; they are also all that a sharded checkpoint holds.
STATE_BYTES = 12
# The sharded bf16 weight, and its gradient accumulated in fp32 (data_types.grad_accum_dtype).
SHARD_BYTES = 2 + 4
# NCCL's own cost model of a ring with its Simple protocol (src/graph/tuning.cc, v2.18 and later): base, one hop over
# NVLink, one hop over the network.
RING_BASE_S, RING_NVLINK_S, RING_NETWORK_S = 8.4e-6, 3.4e-6, 14e-6


class Parameter(NamedTuple):
    """One parameter.

    Attributes:
        elements: of it.
        matrix: more than one dimension; decides the weight-decay group.
    """

    elements: int
    matrix: bool


def trained_parameters(model: Shape, train_vision: bool = False) -> list[Parameter]:
    """List what is trained, in the order of `MirageModel.parameters()`: the text model, then the tower if it is."""
    vision = [name for name in model.shapes if name.startswith("visual.")]
    names = [name for name in model.shapes if not name.startswith("visual.")] + train_vision * vision
    return [Parameter(math.prod(model.shapes[name]), len(model.shapes[name]) > 1) for name in names]


def groups(parameters: Sequence[Parameter]) -> list[list[int]]:
    """Split elements into the optimizer's two groups, as engine.setup.weight_decay_groups does."""
    return [[one.elements for one in parameters if one.matrix is matrix] for matrix in (True, False)]


class Sizes(NamedTuple):
    """Elements of a model.

    Attributes:
        matrices: of one decoder layer, in the order of its walk: q, k, v, o, gate, up, down.
        vectors: biases and norms of one decoder layer.
        layers: decoder layers.
        embedding: the input matrix.
        head: the output matrix; 0 where it is the embedding.
        norm: the final norm.
        vision: the vision tower with its merger.
        width: of a layer's queries, heads · head width.
    """

    matrices: tuple[int, ...]
    vectors: int
    layers: int
    embedding: int
    head: int
    norm: int
    vision: int
    width: int

    @property
    def layer(self) -> int:
        """Elements of one layer's matrices."""
        return sum(self.matrices)

    @property
    def text(self) -> int:
        """Ψ, all elements of the text model."""
        return self.layers * (self.layer + self.vectors) + self.embedding + self.head + self.norm


def sizes(model: Shape) -> Sizes:
    """Count the elements of a model."""
    layer, (embedding,) = "model.layers.0.", model.elements("model.embed_tokens.")
    return Sizes(
        matrices=tuple(model.elements(layer, matrices=True)),
        vectors=sum(model.elements(layer, matrices=False)),
        layers=model.layers("model.layers."),
        embedding=embedding,
        head=sum(model.elements("lm_head.")),
        norm=sum(model.elements("model.norm.")),
        vision=sum(model.elements("visual.")),
        width=model.shapes[f"{layer}self_attn.q_proj.weight"][0],
    )


def two_layers(model: Sizes) -> int:
    """Elements of two decoder layers' matrices: the limits of released parameters.

    `max_live` of one layer leaves no room to gather the next one while the first computes. `reuse` must be longer than
    the way from a layer's first matrix to its end and back, or backward gathers a part of it twice (see volume).
    """
    return 2 * model.layer


class Walk(NamedTuple):
    """How often a forward walks the decoder layers.

    Attributes:
        passes: walks.
        thin: those among them that run one token a row (the latents but the last of each run).
    """

    passes: int
    thin: int


def walk(stage: str, k: int, runs: int = 1) -> Walk:
    """Walks of a stage with `runs` latent runs of k latents in a row: stage2 runs · k + 1, the others one."""
    return Walk(runs * k + 1, runs * (k - 1)) if stage == "stage2" else Walk(1, 0)


class Zero3(NamedTuple):
    """The keys of a DeepSpeed JSON's `zero_optimization` that decide traffic and memory, in elements; its defaults.

    Attributes:
        max_live: stage3_max_live_parameters.
        reuse: stage3_max_reuse_distance.
        prefetch: stage3_prefetch_bucket_size.
        persistence: stage3_param_persistence_threshold.
        bucket: reduce_bucket_size.
        hpz: zero_hpz_partition_size, in ranks.
    """

    max_live: int = 10**9
    reuse: int = 10**9
    prefetch: int = 5 * 10**7
    persistence: int = 10**5
    bucket: int = 5 * 10**8
    hpz: int = 1

    def keeps(self, model: Sizes) -> bool:
        """Whether gathered weights stay until the micro-step ends.

        With room for all of them, and `reuse` above the way to the next use (Ψ from pass to pass, more than 3 Ψ where
        the forward turns into backward). One limit alone keeps most of them, not all.
        """
        return self.max_live >= model.text and self.reuse >= 5 * model.text


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

    Kept: each matrix is gathered once. Released: each pass gathers each layer in the forward, and in backward once more
    for its recomputation, which the layer's gradient then uses too unless `reuse` is too short for that. A bound from
    above: the last layers of the forward are still there when backward begins.
    """
    outside = sum(m for m in (model.embedding, model.head) if m > zero.persistence)
    layers = model.layers * sum(m for m in model.matrices if m > zero.persistence)
    if zero.keeps(model):
        return Volume(layers + outside, 0, model.text)
    again = model.layers * _gathered_again(model.matrices, zero)
    if not model.head:  # a tied matrix is gathered as embedding and as head
        outside *= 2
    return Volume(walked.passes * layers + outside, walked.passes * (layers + again) + outside, model.text)


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
    layer = [m for m in model.matrices if m > zero.persistence]
    head = model.head or (0 if zero.keeps(model) else model.embedding)
    passes = 1 if zero.keeps(model) else walked.passes
    forward = _joined([model.embedding, *chain(*[layer] * (model.layers * passes)), head], zero.prefetch)
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

    Gradients are reduce-scattered among all ranks in every micro-step. With hpZ only a weight's first gather in the
    optimizer step is among all ranks; all others, of later micro-steps too, are inside groups of `hpz` ranks.
    """
    if ranks == 1:
        return Traffic(0, 0, 0, 0)
    moved, calls = volume(model, walked, zero), gather_calls(model, walked, zero)
    gathered, gathers = micro_steps * moved.gathered, micro_steps * calls
    reduced, reductions = micro_steps * moved.reduced, micro_steps * math.ceil(moved.reduced / zero.bucket)
    if zero.hpz == 1 or zero.hpz >= ranks:
        return Traffic(gathered + reduced, gathers + reductions, 0, 0)
    first = zero._replace(max_live=model.text, reuse=5 * model.text)
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
        nics: bytes/s of all network cards of a node together, in one direction.
    """

    name: str
    gpus: int
    flops: float
    memory: float
    hbm: float
    nvlink: float
    nics: float


def ring_bytes(elements: float, ranks: int, width: int = BF16) -> float:
    """Bytes that each rank sends and receives in a ring all-gather or reduce-scatter: b · (W − 1) / W an element.

    Patarasuk and Yuan, doi 10.1016/j.jpdc.2008.09.002. Where the rings cross nodes, all network cards of a node
    together carry the same number: each ring enters and leaves a node once.
    """
    return elements * width * (ranks - 1) / ranks


def least_node_bytes(elements: float, nodes: int, width: int = BF16) -> float:
    """Bytes that must enter a node whatever the algorithm: what lies in the other nodes, b · (N − 1) / N."""
    return elements * width * (nodes - 1) / nodes


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


def thin_bytes(model: Sizes, walked: Walk, width: int = BF16) -> float:
    """Bytes that the passes of one token a row move through a GPU's memory: there the weights' size is what counts.

    Forward, recomputation and backward read the weights; the gradient is written, then added to the earlier passes'
    (two reads, one write).
    """
    return walked.thin * 7 * model.layers * model.layer * width


def compute_seconds(
    model: Sizes, walked: Walk, machine: Machine, tokens: float, labelled: float = 0, keys: float = 0, used: float = 1.0
) -> float:
    """Seconds of one micro-step's arithmetic on one GPU with checkpointed layers.

    Args:
        used: share of the peak FLOP/s that is reached.
    """
    work = flops(model, tokens, labelled, keys) / (machine.flops * used)
    return work + thin_bytes(model, walked) / machine.hbm


def break_even_tokens(
    seconds: float, model: Sizes, walked: Walk, machine: Machine, labelled: float, keys: float, used: float = 1.0
) -> float:
    """Tokens of one rank's micro-step whose arithmetic takes as long as its collectives.

    Args:
        seconds: of the collectives.
        labelled: share of the tokens that go through the output matrix.
    """
    fixed = compute_seconds(model, walked, machine, 0, 0, keys, used)
    one = compute_seconds(model, walked, machine, 1, labelled, keys, used) - fixed
    return max(0.0, seconds - fixed) / one


class Memory(NamedTuple):
    """Bytes of one GPU, without activations, logits and the allocator's own losses.

    Attributes:
        shard: its part of bf16 weights, fp32 gradients, fp32 master weights and moments.
        secondary: hpZ's second copy of the weights, shared by a node.
        gathered: whole weights at one time.
        gradients: whole bf16 gradients at one time: the reduce bucket, and in stage2 those of all layers, since a
            weight's gradient is complete only when backward has come to the first pass.
    """

    shard: float
    secondary: float
    gathered: float
    gradients: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def memory(model: Sizes, walked: Walk, zero: Zero3, ranks: int) -> Memory:
    """Model states and whole tensors of one GPU under ZeRO-3 with bf16 weights and fp32 accumulation."""
    live = model.text if zero.keeps(model) else min(model.text, max(zero.max_live, zero.reuse, *model.matrices))
    held = model.layers * model.layer if walked.passes > 1 else 0
    return Memory(
        shard=model.text * (SHARD_BYTES + STATE_BYTES) / ranks,
        secondary=model.text * BF16 / min(zero.hpz, ranks) if zero.hpz > 1 else 0.0,
        gathered=live * BF16,
        gradients=(held + min(zero.bucket, model.text)) * BF16,
    )


def checkpoint_bytes(model: Sizes) -> int:
    """Bytes of a sharded checkpoint, whatever the number of ranks."""
    return STATE_BYTES * model.text
