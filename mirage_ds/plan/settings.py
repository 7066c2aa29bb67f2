"""What a DeepSpeed JSON says of memory and traffic, with DeepSpeed 0.19.8's defaults. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.engine.ds_config import LIMITS, compute_dtype, zero_stage
from mirage_ds.errors import UserError, shown
from mirage_ds.plan.formulas import Sizes, Zero3, two_layers

BYTES = {"float32": 4, "bfloat16": 2}
# data_types.grad_accum_dtype; "fp16" has no place here.
ACCUMULATION = {"fp32": 4, "bf16": 2, "float32": 4, "bfloat16": 2}
DEVICES = ("none", "cpu", "nvme")
# zero/config.py and zero/offload_config.py.
SUB_GROUP = 10**9
OPTIMIZER_BUFFERS = 4
PARAMETER_BUFFERS, PARAMETER_BUFFER = 5, 10**8
MAX_IN_CPU = 10**9


class Settings(NamedTuple):
    """What decides sizes.

    Attributes:
        stage: of ZeRO.
        compute, accumulated, master, moments: bytes of an element of the weights in the forward, the summed gradients,
            the weights the optimizer moves, and each of AdamW's two moments.
        zero: ZeRO-3's limits.
        contiguous, overlap: contiguous_gradients, overlap_comm.
        sub_group: elements that the optimizer updates at a time (ZeRO-3).
        parameters_on, optimizer_on: "none" (GPU), "cpu" or "nvme".
        parameter_buffers, parameter_buffer: host buffers for swapped parameters, and the elements of each.
        in_cpu: elements of swapped parameters that stay in host memory all the same.
        optimizer_buffers: host buffers for swapped optimizer states.
    """

    stage: int
    compute: int
    accumulated: int
    master: int
    moments: int
    zero: Zero3
    contiguous: bool = True
    overlap: bool = False
    sub_group: int = SUB_GROUP
    parameters_on: str = "none"
    optimizer_on: str = "none"
    parameter_buffers: int = PARAMETER_BUFFERS
    parameter_buffer: int = PARAMETER_BUFFER
    in_cpu: int = MAX_IN_CPU
    optimizer_buffers: int = OPTIMIZER_BUFFERS

    @property
    def whole_sums(self) -> bool:
        """ZeRO-1 in bf16 with fp32 sums: DeepSpeed's BF16_Optimizer, which keeps all sums on each rank."""
        return self.stage == 1 and self.compute != self.accumulated and self.optimizer_on == "none"

    @property
    def moves_all_weights(self) -> bool:
        """Master weights and moments are in fp32, so that small updates are not rounded away."""
        return self.master == self.moments == 4


def read_settings(values: Mapping[str, Any], path: Path, model: Sizes) -> Settings:
    """Read a JSON that ds_config.read_json has checked.

    Args:
        model: from which limits of "auto" are filled as the run fills them.

    Raises:
        UserError: a value of a wrong type, or a mix that DeepSpeed refuses.
    """
    zero, bf16 = _block(values, "zero_optimization", path), _block(values, "bf16", path)
    stage, compute = zero_stage(dict(values)), BYTES[compute_dtype(dict(values))]
    low_master, low_moments = bool(bf16.get("bf16_master_weights_and_grads")), bool(bf16.get("bf16_optimizer_states"))
    said = _block(values, "data_types", path).get("grad_accum_dtype")
    if said is not None and said not in ACCUMULATION:
        raise UserError(f'{path}: \'data_types.grad_accum_dtype\' is {shown(said)}; write "fp32" or "bf16"')
    accumulated = compute if said is None else ACCUMULATION[said]
    parameters, optimizer = (_offload(zero, name, path) for name in ("offload_param", "offload_optimizer"))
    if stage != 3 and parameters["device"] != "none":
        raise UserError(f"{path}: 'offload_param' needs ZeRO-3, and the stage is {stage}; remove it or write 3")
    if stage == 0 and (compute != accumulated or optimizer["device"] != "none"):
        raise UserError(f"{path}: ZeRO-0 knows neither sums of another dtype nor offload; write stage 1, 2 or 3")
    live, reuse = (
        two_layers(model) if zero.get(name) == "auto" else _number(zero, name, 10**9, path) for name in LIMITS
    )
    return Settings(
        stage=stage,
        compute=compute,
        accumulated=accumulated,
        master=2 if low_master else 4,
        moments=2 if low_moments else 4,
        zero=Zero3(
            max_live=live,
            reuse=reuse,
            prefetch=_number(zero, "stage3_prefetch_bucket_size", 5 * 10**7, path),
            persistence=_number(zero, "stage3_param_persistence_threshold", 10**5, path),
            bucket=_number(zero, "reduce_bucket_size", 5 * 10**8, path),
            hpz=max(1, _number(zero, "zero_hpz_partition_size", 1, path)),
        ),
        contiguous=bool(zero.get("contiguous_gradients", True)),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        sub_group=_number(zero, "sub_group_size", SUB_GROUP, path),
        parameters_on=parameters["device"],
        optimizer_on=optimizer["device"],
        parameter_buffers=_number(parameters, "buffer_count", PARAMETER_BUFFERS, path),
        parameter_buffer=_number(parameters, "buffer_size", PARAMETER_BUFFER, path),
        in_cpu=_number(parameters, "max_in_cpu", MAX_IN_CPU, path),
        optimizer_buffers=_number(optimizer, "buffer_count", OPTIMIZER_BUFFERS, path),
    )


def _block(values: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    block = values.get(name) or {}
    if not isinstance(block, dict):
        raise UserError(f"{path}: '{name}' is {shown(block)}; write an object, such as {{…}}")
    return block


def _offload(zero: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    block = {"device": "none", **_block(zero, name, path)}
    if block["device"] not in DEVICES:
        raise UserError(f'{path}: \'{name}.device\' is {shown(block["device"])}; write "none", "cpu" or "nvme"')
    return block


def _number(values: Mapping[str, Any], name: str, default: int, path: Path) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UserError(f"{path}: '{name}' is {shown(value)}; write a number of elements")
    return int(value)
