"""Model states: which bytes of parameters, gradients and optimizer lie where, for any ZeRO stage, offloaded or not.

Ψ elements of the trained parameters, n of one of them, W ranks; b, a, m, s bytes of an element of the compute dtype,
the summed gradients, the master weights, and each moment.

Read in DeepSpeed 0.19.8: zero/stage3.py (`_create_fp16_partitions_with_defragmentation`, `_create_fp32_partitions`,
`_setup_for_real_optimizer`, `initialize_optimizer_states`), zero/stage_1_and_2.py, bf16_optimizer.py.
tests/dist/test_planned.py compares parameters, gradients, master weights and moments with the engine's own tensors, to
the byte. Two scalars a parameter group (AdamW's step) are left out.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from mirage_ds.plan.activations import Terms
from mirage_ds.plan.settings import Settings

# stage_1_and_2.py and bf16_optimizer.py align the flat groups to 2 elements a rank (nccl_start_alignment_factor).
ALIGNMENT = 2
# Elements of each parameter, group by group.
Groups = Sequence[Sequence[int]]


class States(NamedTuple):
    """Bytes of one rank, by name.

    Attributes:
        gpu: held all the time.
        step: on the GPU while the optimizer steps, when activations are gone.
        host: of this rank; a node has as many as it has GPUs.
        obstacle: why this cannot run, if so.
    """

    gpu: Terms
    step: Terms
    host: Terms
    obstacle: str | None = None


def states(groups: Groups, settings: Settings, ranks: int, micro_steps: int = 1) -> States:
    """Count the states of one rank.

    Args:
        groups: the elements of the trained parameters (shape.trained_parameters).
        micro_steps: backwards of an optimizer step; with several, ZeRO-1 keeps whole gradients until the last of them.
    """
    if settings.stage == 3:
        return _sharded(groups, settings, ranks)
    return _flat(groups, settings, ranks, micro_steps)


class Written(NamedTuple):
    """Bytes of the tensors in a sharded checkpoint.

    Frozen weights are not among them: the state names their hashes. Nor is anything random or of the loader: seed and
    step say which rows come next. Pickles, counters and the manifest add kilobytes.

    Attributes:
        weights: those of the forward, which rank 0 writes; none under ZeRO-3.
        optimizer: master weights and moments, with padding, of each of the `ranks` that write them.
    """

    weights: int
    optimizer: int
    ranks: int

    @property
    def all(self) -> int:
        """Of all ranks."""
        return self.weights + self.ranks * self.optimizer


def written(groups: Groups, settings: Settings, ranks: int) -> Written:
    """Count a checkpoint's files; `groups` as in states."""
    each, b = settings.master + 2 * settings.moments, settings.compute
    if settings.stage == 3:
        return Written(0, each * sum(part(n, ranks) for n in chain(*groups)), ranks)
    if settings.stage == 0:
        elements = sum(map(sum, groups))
        # In fp32 the forward's weights are the optimizer's.
        return Written(b * elements, (each - settings.master * (b == settings.master)) * elements, 1)
    whole = sum(_padded(groups, ranks))
    return Written(b * whole, each * whole // ranks, ranks)


def _padded(groups: Groups, ranks: int) -> list[int]:
    """Elements of ZeRO-1's and 2's flat groups."""
    padding = ALIGNMENT * ranks
    return [math.ceil(sum(group) / padding) * padding for group in groups]


def part(elements: int, ranks: int) -> int:
    """Elements of a parameter that one rank holds under ZeRO-3, padding included."""
    return -(-elements // ranks)


def sub_groups(group: Sequence[int], limit: int, ranks: int) -> list[list[int]]:
    """Split an optimizer group into the sub-groups that ZeRO-3 steps one by one (`_create_fp16_sub_groups`).

    Args:
        group: elements of its parameters, in their order.
        limit: sub_group_size.

    Returns:
        The elements (whole, not the rank's part) of each sub-group's parameters.
    """
    found: list[list[int]] = [[]]
    held = 0
    for elements in group:
        if held >= limit:
            found.append([])
            held = 0
        found[-1].append(elements)
        held += part(elements, ranks)
    return found


def _sharded(groups: Groups, settings: Settings, ranks: int) -> States:
    zero, b = settings.zero, settings.compute
    every = list(chain(*groups))
    shard = sum(part(n, ranks) for n in every)
    gpu: Terms = {}
    host: Terms = {}
    obstacle = None
    (host if settings.offload_parameters else gpu)["parameters, sharded (b Ψ / W)"] = shard * b
    gpu["weights that stay whole (persistence)"] = b * sum(n for n in every if n <= zero.persistence)
    if zero.hpz > 1:
        if ranks % zero.hpz:
            obstacle = f"zero_hpz_partition_size {zero.hpz} does not divide {ranks} ranks"
        gpu["hpZ's second copy (b Ψ / hpZ)"] = shard * ranks * b // min(zero.hpz, ranks)
    optimizer = {
        "gradients, summed (a Ψ / W)": shard * settings.accumulated,
        # Also where the shard has the same dtype: DeepSpeed would share it, but compares a device with a string.
        "master weights (m Ψ / W)": shard * settings.master,
        "moments (2 s Ψ / W)": 2 * shard * settings.moments,
    }
    step = {}
    if settings.offload_optimizer:
        host |= optimizer | {"gradients for the optimizer (m Ψ / W)": shard * settings.master}
    else:
        gpu |= optimizer
        largest = max(
            sum(part(n, ranks) for n in sub) for group in groups for sub in sub_groups(group, zero.sub_group, ranks)
        )
        step = _optimizer_work(largest, settings)
    if zero.contiguous:
        gpu["bucket of gradients (reduce_bucket_size)"] = zero.bucket * b
    return States(gpu, step, host, obstacle)


def _optimizer_work(elements: int, settings: Settings) -> Terms:
    """What updating `elements` takes beside the states: the gradient in the master's dtype. AdamW is fused."""
    return {"gradients for the optimizer, of a sub-group": elements * settings.master}


def _flat(groups: Groups, settings: Settings, ranks: int, micro_steps: int) -> States:
    zero, b = settings.zero, settings.compute
    elements = sum(map(sum, groups))
    if settings.stage == 0:
        gpu = {"parameters, whole (b Ψ)": elements * b, "gradients, whole (b Ψ)": elements * b}
        gpu["master weights (m Ψ)"] = 0 if b == settings.master else elements * settings.master
        gpu["moments (2 s Ψ)"] = 2 * elements * settings.moments
        return States(gpu, _optimizer_work(elements, settings), {})
    flat = _padded(groups, ranks)
    own, largest = sum(flat) // ranks, max(map(max, groups))
    gpu = {"parameters, whole (b Ψ)": sum(flat) * b}
    host: Terms = {}
    optimizer = {"master weights (m Ψ / W)": own * settings.master, "moments (2 s Ψ / W)": 2 * own * settings.moments}
    if not settings.offload_optimizer:
        gpu |= optimizer
    else:
        # The optimizer's gradient, one more sum over micro-steps, the new weights on their way back.
        host |= optimizer
        host["gradients for the optimizer (m Ψ / W)"] = own * settings.master
        host["gradients, summed (b Ψ)"] = sum(flat) * b
        host["new weights (b Ψ / W)"] = own * b
        host["buffer of the largest gradient"] = largest * b
        gpu["buffer of the largest gradient"] = largest * b
    if settings.whole_sums:
        gpu["gradients, whole sums (a Ψ)"] = sum(flat) * settings.accumulated
        # The weights' own gradients are added to the sums when backward is through (immediate_grad_update is off).
        gpu["whole gradients of a micro-step (b Ψ)"] = elements * b
    elif not settings.offload_optimizer:
        gpu["gradients, summed (a Ψ / W)"] = own * settings.accumulated
    if settings.stage == 1 and micro_steps > 1 and not settings.whole_sums:
        gpu["gradients, whole, until the last micro-step (a Ψ)"] = elements * settings.accumulated
    if zero.contiguous and not settings.whole_sums:
        gpu["buckets of gradients (reduce_bucket_size)"] = (1 + bool(zero.overlap)) * zero.bucket * b
    step = {} if settings.offload_optimizer else _optimizer_work(max(flat) // ranks, settings)
    return States(gpu, step, host)
