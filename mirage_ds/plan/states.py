"""Model states: which bytes of parameters, gradients and optimizer lie where, for any ZeRO stage and offload.

Ψ elements of the trained parameters, n of one of them, W ranks; b, a, m, s bytes of an element of the compute dtype,
the summed gradients, the master weights, and each moment.

Read in DeepSpeed 0.19.8: zero/stage3.py (`_create_fp16_partitions_with_defragmentation`, `_create_fp32_partitions`,
`_setup_for_real_optimizer`, `initialize_optimizer_states`), zero/stage_1_and_2.py, bf16_optimizer.py, swap_tensor/.
tests/dist/test_planned.py compares parameters, gradients, master weights and moments with the engine's own tensors, to
the byte. Two scalars a parameter group (AdamW's step) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mirage_ds.engine.offload_bytes import SWAPPED_BYTES, part, sub_groups
from mirage_ds.plan.formulas import Parameter, groups
from mirage_ds.plan.settings import Settings

# stage_1_and_2.py and bf16_optimizer.py align the flat groups to 2 elements a rank (nccl_start_alignment_factor).
ALIGNMENT = 2
Terms = dict[str, int]


class States(NamedTuple):
    """Bytes of one rank, by name.

    Attributes:
        gpu: held all the time.
        step: on the GPU while the optimizer steps, when activations are gone.
        host, disk: of this rank; a node has as many as it has GPUs.
        obstacle: why this cannot run, if so.
    """

    gpu: Terms
    step: Terms
    host: Terms
    disk: Terms
    obstacle: str | None = None


def states(parameters: Sequence[Parameter], settings: Settings, ranks: int, micro_steps: int = 1) -> States:
    """Count the states of one rank.

    Args:
        parameters: the trained ones, in the order of the model.
        micro_steps: of an optimizer step; with several, ZeRO-1 keeps whole gradients until the last of them.
    """
    if settings.stage == 3:
        return _sharded(parameters, settings, ranks)
    return _flat(parameters, settings, ranks, micro_steps)


def _sharded(parameters: Sequence[Parameter], settings: Settings, ranks: int) -> States:
    zero, b = settings.zero, settings.compute
    shard = sum(part(one.elements, ranks) for one in parameters)
    whole = [sub for group in groups(parameters) for sub in sub_groups(group, settings.sub_group, ranks)]
    parts = [sum(part(n, ranks) for n in sub) for sub in whole]
    gpu: Terms = {}
    host: Terms = {}
    disk: Terms = {}
    obstacle = None
    if settings.parameters_on == "none":
        gpu["parameters, sharded (b Ψ / W)"] = shard * b
    elif settings.parameters_on == "cpu":
        host["parameters, sharded (b Ψ / W)"] = shard * b
    else:
        stays = min(shard, settings.in_cpu)
        host["parameters that stay in memory (max_in_cpu)"] = stays * b
        host["buffers of parameters"] = settings.parameter_buffers * settings.parameter_buffer * b
        disk["parameters, sharded (b Ψ / W)"] = shard * b
        if stays < shard:
            # DeepSpeed takes the elements of the parameters there, not of the rank's parts of them.
            written = sum(whole[parts.index(max(parts))])
            host["copy of a sub-group's whole weights, to write them"] = written * b
        largest = max(part(one.elements, ranks) for one in parameters)
        if largest > settings.parameter_buffer:
            obstacle = f"offload_param.buffer_size {settings.parameter_buffer:,} is below {largest:,}"
    gpu["small parameters, whole (persistence)"] = b * sum(
        one.elements for one in parameters if one.elements <= zero.persistence
    )
    if zero.hpz > 1:
        if ranks % zero.hpz:
            obstacle = f"zero_hpz_partition_size {zero.hpz} does not divide {ranks} ranks"
        gpu["hpZ's second copy (b Ψ / hpZ)"] = shard * ranks * b // min(zero.hpz, ranks)
    sums, masters, moments = shard * settings.accumulated, shard * settings.master, 2 * shard * settings.moments
    names = ("gradients, summed (a Ψ / W)", "master weights (m Ψ / W)", "moments (2 s Ψ / W)")
    if settings.optimizer_on == "none":
        # Also where the shard has the same dtype: DeepSpeed would share it, but compares a device with a string.
        gpu |= dict(zip(names, (sums, masters, moments), strict=True))
    else:
        host[names[0]] = sums
        swapped = [size for size in parts if size * settings.master >= SWAPPED_BYTES] * (
            settings.optimizer_on == "nvme"
        )
        here = shard - sum(swapped)
        host[names[1]], host[names[2]] = here * settings.master, 2 * here * settings.moments
        host["gradients for the optimizer (m Ψ / W)"] = here * settings.master
        if swapped:
            # Master weight, gradient and two moments of each swapped part.
            disk["optimizer (2 m + 2 s) Ψ / W"] = sum(swapped) * (2 * settings.master + 2 * settings.moments)
            host["buffers of the optimizer"] = settings.optimizer_buffers * max(swapped) * settings.master
    if settings.contiguous:
        gpu["bucket of gradients (reduce_bucket_size)"] = zero.bucket * b
    step = {} if settings.optimizer_on != "none" else _optimizer_work(max(parts), settings)
    return States(gpu, step, host, disk, obstacle)


def _optimizer_work(elements: int, settings: Settings) -> Terms:
    """What updating `elements` takes beside the states: the gradient in the master's dtype. AdamW is fused."""
    return {"gradients for the optimizer, of a sub-group": elements * settings.master}


def _flat(parameters: Sequence[Parameter], settings: Settings, ranks: int, micro_steps: int) -> States:
    b = settings.compute
    elements = sum(one.elements for one in parameters)
    if settings.stage == 0:
        gpu = {"parameters, whole (b Ψ)": elements * b, "gradients, whole (b Ψ)": elements * b}
        gpu["master weights (m Ψ)"] = 0 if b == settings.master else elements * settings.master
        gpu["moments (2 s Ψ)"] = 2 * elements * settings.moments
        return States(gpu, _optimizer_work(elements, settings), {}, {})
    padding = ALIGNMENT * ranks
    flat = [math.ceil(sum(group) / padding) * padding for group in groups(parameters)]
    part, largest = sum(flat) // ranks, max(one.elements for one in parameters)
    gpu = {"parameters, whole (b Ψ)": sum(flat) * b}
    host: Terms = {}
    optimizer = {
        "master weights (m Ψ / W)": part * settings.master,
        "moments (2 s Ψ / W)": 2 * part * settings.moments,
    }
    if settings.optimizer_on == "none":
        gpu |= optimizer
    else:
        # The optimizer's gradient, one more sum over micro-steps, the new weights on their way back.
        host |= optimizer
        host["gradients for the optimizer (m Ψ / W)"] = part * settings.master
        host["gradients, summed (b Ψ)"] = sum(flat) * b
        host["new weights (b Ψ / W)"] = part * b
        host["buffer of the largest gradient"] = largest * b
        gpu["buffer of the largest gradient"] = largest * b
    if settings.whole_sums:
        gpu["gradients, whole sums (a Ψ)"] = sum(flat) * settings.accumulated
        # The weights' own gradients are added to the sums when backward is through (immediate_grad_update is off).
        gpu["whole gradients of a micro-step (b Ψ)"] = elements * b
    elif settings.optimizer_on == "none":
        gpu["gradients, summed (a Ψ / W)"] = part * settings.accumulated
    if settings.stage == 1 and micro_steps > 1 and not settings.whole_sums:
        gpu["gradients, whole, until the last micro-step (a Ψ)"] = elements * settings.accumulated
    if settings.contiguous and not settings.whole_sums:
        gpu["buckets of gradients (reduce_bucket_size)"] = (1 + settings.overlap) * settings.zero.bucket * b
    step = {} if settings.optimizer_on != "none" else _optimizer_work(max(flat) // ranks, settings)
    return States(gpu, step, host, {})
