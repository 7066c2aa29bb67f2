"""What a DeepSpeed JSON says of memory and traffic, with DeepSpeed 0.19.8's defaults. Imports no torch."""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from mirage_ds.engine.ds_config import compute_dtype, fill_limits, offload_device, zero_stage
from mirage_ds.errors import UserError, shown
from mirage_ds.plan.shape import Sizes

BYTES = {"float32": 4, "bfloat16": 2}
# data_types.grad_accum_dtype, as runtime/config.py spells it; float16 has no place here.
ACCUMULATION = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), 4),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), 2),
}


@dataclass(frozen=True, config=ConfigDict(populate_by_name=True))
class Zero3:
    """What of a DeepSpeed JSON's `zero_optimization` decides traffic and memory; types as in its zero/config.py.

    In elements, but hpz in ranks; the last two are switches.
    """

    max_live: NonNegativeInt = Field(10**9, validation_alias="stage3_max_live_parameters")
    reuse: NonNegativeInt = Field(10**9, validation_alias="stage3_max_reuse_distance")
    prefetch: NonNegativeInt = Field(5 * 10**7, validation_alias="stage3_prefetch_bucket_size")
    persistence: NonNegativeInt = Field(10**5, validation_alias="stage3_param_persistence_threshold")
    bucket: PositiveInt = Field(5 * 10**8, validation_alias="reduce_bucket_size")
    hpz: NonNegativeInt = Field(1, validation_alias="zero_hpz_partition_size")
    sub_group: NonNegativeInt = Field(10**9, validation_alias="sub_group_size")
    contiguous: bool = Field(True, validation_alias="contiguous_gradients")
    # None: with ZeRO-3 alone.
    overlap: bool | None = Field(None, validation_alias="overlap_comm")

    def resident(self, model: Sizes) -> bool:
        """Whether every weight stays whole from step to step (persistence, as in zero3_kept.json)."""
        return self.persistence >= max(*model.matrices, model.embedding, model.head)

    def live(self, model: Sizes) -> int:
        """Elements of gathered weights at one time."""
        return model.text if self.resident(model) else min(model.text, max(self.max_live, self.reuse, *model.matrices))


class Settings(NamedTuple):
    """What decides sizes.

    Attributes:
        stage: of ZeRO.
        compute, accumulated, master, moments: bytes of an element of the weights in the forward, the summed gradients,
            the weights the optimizer moves, and each of AdamW's two moments.
        zero: limits of gathering, reducing and the optimizer's step.
        offload_parameters, offload_optimizer: to the host's memory.
    """

    stage: int
    compute: int
    accumulated: int
    master: int
    moments: int
    zero: Zero3
    offload_parameters: bool = False
    offload_optimizer: bool = False

    @property
    def whole_sums(self) -> bool:
        """ZeRO-1 in bf16 with fp32 sums: DeepSpeed's BF16_Optimizer, which keeps all sums on each rank."""
        return self.stage == 1 and self.compute != self.accumulated and not self.offload_optimizer

    def resident(self, model: Sizes) -> bool:
        """Whether all weights are whole all the time, so that thin passes are not checkpointed."""
        return self.stage != 3 or self.zero.resident(model)

    @property
    def moves_all_weights(self) -> bool:
        """Master weights and moments are in fp32, so that small updates are not rounded away."""
        return self.master == self.moments == 4


def two_layers(model: Sizes) -> int:
    """Elements of two decoder layers' matrices: the limits of released parameters.

    `max_live` of one layer leaves no room to gather the next one while the first computes.
    """
    return 2 * model.layer


def read_settings(values: dict[str, Any], path: Path, model: Sizes) -> Settings:
    """Read a JSON that ds_config.read_json has checked; its limits of "auto" are filled, as the run fills them.

    Raises:
        UserError: a value of a wrong type, or a mix that DeepSpeed refuses.
    """
    bf16 = values.get("bf16", {})
    stage, compute = zero_stage(values), BYTES[compute_dtype(values)]
    said = values.get("data_types", {}).get("grad_accum_dtype")
    if said is not None and said not in ACCUMULATION:
        raise UserError(f'{path}: \'data_types.grad_accum_dtype\' is {shown(said)}; write "fp32" or "bf16"')
    accumulated = compute if said is None else ACCUMULATION[said]
    if stage == 0 and compute != accumulated:
        raise UserError(f"{path}: ZeRO-0 sums gradients in the dtype of the weights; write stage 1, 2 or 3")
    fill_limits(values, two_layers(model))
    try:
        zero = Zero3(**values.get("zero_optimization", {}))
    except ValidationError as error:
        wrong = error.errors()[0]
        wanted = "true or false" if wrong["type"].startswith("bool") else "a number of elements"
        raise UserError(f"{path}: '{wrong['loc'][0]}' is {shown(wrong['input'])}; write {wanted}") from None
    return Settings(
        stage=stage,
        compute=compute,
        accumulated=accumulated,
        master=2 if bf16.get("bf16_master_weights_and_grads") else 4,
        moments=2 if bf16.get("bf16_optimizer_states") else 4,
        zero=zero,
        offload_parameters=offload_device(values, "param") == "cpu",
        offload_optimizer=offload_device(values, "optimizer") == "cpu",
    )
