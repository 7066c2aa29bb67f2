"""The DeepSpeed JSON: what it may say, which one a stage takes (DEFAULTS), and what a run changes in it.

run/settings.py (check_settings) calls these in order: --deepspeed or default_path, read_json, resolve, then on a CPU
versions.gather_safely, and fill_limits; a resume on other ranks adds universal.use_universal. Imports neither torch nor
DeepSpeed.

The JSON chooses ZeRO stage, offload and precision. Batch size, clipping and optimizer come from the run's settings; a
JSON that says something else about them is refused, since one of the two would be silently ignored.

ds_configs/ holds one JSON a recipe, written for GPUs; on a CPU a recipe is changed as it is read (_for_cpu).
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError, closest, reason, shown, strict_json
from mirage_ds.files import shipped

# What DeepSpeed's keys are, and which of them a run cannot honour.
KEYS = yaml.safe_load(Path(__file__).with_name("ds_keys.yaml").read_text(encoding="utf-8"))
# What torch's AdamW and DeepSpeed's take; another name stops the start only after the model is loaded.
OPTIMIZER_PARAMS = frozenset(
    "lr betas eps weight_decay torch_adam adam_w_mode bias_correction amsgrad fused foreach capturable maximize".split()  # noqa: SIM905
)
# What of the gathered parameters may be whole at a time, and how near its next use must be for one to stay.
LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
# Elements of a parameter that ZeRO-3 keeps whole from step to step: more than any matrix has.
KEEPS_ALL = 10**12
# Those that somebody here looks into.
BLOCKS = ("fp16", "bf16", "torch_autocast", "data_types", "zero_optimization", "optimizer")
# The run fills these; `"auto"` there means just that.
FILLED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
FILLED |= {f"optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")}
FILLED |= {f"zero_optimization.{name}" for name in LIMITS}
# The recipe of a stage where no JSON is given.
DEFAULTS = {"sft": "zero3", "scaffold": "zero3", "stage1": "zero3", "stage2": "zero3_kept", "rl": "zero3_kept"}


def shipped_folder() -> Path:
    """Return ds_configs/, inside the installed package or beside it in a checkout."""
    return shipped() / "ds_configs"


def recipes() -> list[Path]:
    """List the shipped JSONs."""
    return sorted(shipped_folder().glob("*.json"))


def default_path(stage: str) -> Path:
    """Return the recipe of a stage where no JSON is given."""
    return shipped_folder() / f"{DEFAULTS[stage]}.json"


def _for_cpu(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe as a CPU runs it: in float32 (bf16 states stay), sharded whatever the size, nothing compiled."""
    made = deepcopy(values)
    if not made.get("bf16", {}).get("bf16_optimizer_states"):
        made.pop("bf16", None)
        made.pop("data_types", None)
    zero = made.get("zero_optimization", {})
    zero["overlap_comm"] = False
    if zero_stage(made) == 3 and zero.get("stage3_param_persistence_threshold") != KEEPS_ALL:
        # The recipes' 100,000 elements would keep every matrix of a small model whole on every rank.
        zero["stage3_param_persistence_threshold"] = 0
    for name in ("param", "optimizer"):
        if offload_device(made, name) != "none":
            zero[f"offload_{name}"]["pin_memory"] = False
            made.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    return made


def read_json(path: Path, device: str = "cuda") -> dict[str, Any]:
    """Read and check a DeepSpeed JSON.

    Args:
        device: "cpu" changes a recipe for CPUs; a JSON of the user's own is taken as it stands.

    Raises:
        UserError: missing, broken, a key that DeepSpeed does not know, or a choice this trainer cannot honour.
    """
    if not path.is_file():
        shipped = ", ".join(file.name for file in recipes())
        raise UserError(
            f"--deepspeed {path}: no such file; {shipped_folder()} holds {shipped}; its README.md says which to take"
        )
    try:
        values = strict_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason(error)}); correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object, found {type(values).__name__}")
    for key in values:
        if key in KEYS["refused"]:
            raise UserError(f"{path}: '{key}' {KEYS['refused'][key]}")
        if key not in KEYS["known"]:
            raise UserError(f"{path}: DeepSpeed has no key '{key}' and would ignore it{closest(key, KEYS['known'])}")
    _check_blocks(values, path)
    _check_precision(values, path)
    _refuse_auto(values, path)
    _refuse_unused(values, path)
    return _for_cpu(values) if device == "cpu" and _is_recipe(values, path) else values


def _is_recipe(values: dict[str, Any], path: Path) -> bool:
    """Tell whether a JSON is a shipped one, in whatever copy of ds_configs/: by its name and what it holds."""
    shipped = shipped_folder() / path.name
    return shipped.is_file() and strict_json(shipped.read_text(encoding="utf-8")) == values


def _refuse_unused(values: dict[str, Any], path: Path) -> None:
    """Refuse what DeepSpeed stops at only once the model is loaded, or ignores."""
    for name, about in KEYS["unused"].items():
        block, _, key = name.rpartition(".")
        place = values.get(block, {}) if block else values
        if not isinstance(place, dict) or key not in place:
            continue
        value = place[key]
        if "switch" in about and isinstance(value, dict):
            value = value.get(about["switch"])
        nothing = isinstance(value, dict) and not any(value.values())
        if not (value in about["same"] if "same" in about else nothing or not value):
            raise UserError(f"{path}: '{name}' is not supported: {about['why']}; remove it")
    for name, least in (("param", 3), ("optimizer", 1)):
        device = offload_device(values, name)
        if device == "nvme":
            raise UserError(
                f"{path}: 'zero_optimization.offload_{name}' is on NVMe, and DeepSpeed can neither save nor restore "
                "such a run; write \"cpu\" as its 'device'"
            )
        if device not in ("none", "cpu"):
            raise UserError(f'{path}: \'offload_{name}.device\' is {shown(device)}; write "none" or "cpu"')
        if device != "none" and zero_stage(values) < least:
            raise UserError(
                f"{path}: 'zero_optimization.offload_{name}' needs 'stage' {least}{' or more' if least < 3 else ''}, "
                f"which is {zero_stage(values)}; DeepSpeed would ignore it: change the stage, or remove it"
            )


def _check_precision(values: dict[str, Any], path: Path) -> None:
    """Refuse combinations of dtypes that DeepSpeed stops at only once the model is loaded, or that overflow."""
    if values.get("fp16", {}).get("enabled"):
        raise UserError(f"{path}: 'fp16' is not supported (Qwen2.5-VL overflows in it); use 'bf16'")
    cast, bf16 = values.get("torch_autocast", {}), values.get("bf16", {})
    if cast.get("enabled") and cast.get("dtype") not in ("bfloat16", "bf16", "torch.bfloat16"):
        raise UserError(
            f"{path}: 'torch_autocast.dtype' is {shown(cast.get('dtype'))}; write \"bfloat16\" (float16, torch's own "
            "choice on GPUs, overflows in Qwen2.5-VL)"
        )
    if cast.get("enabled") and bf16.get("enabled"):
        raise UserError(f"{path}: 'torch_autocast' and 'bf16' are both enabled; keep one")
    # DeepSpeed stops at it too, but only once the engine starts, and plan starts none.
    alone = bf16.get("bf16_master_weights_and_grads") and not bf16.get("bf16_optimizer_states")
    if alone and offload_device(values, "optimizer") == "none":
        raise UserError(
            f"{path}: 'bf16.bf16_master_weights_and_grads' without 'bf16_optimizer_states' needs 'offload_optimizer'; "
            "add one of them"
        )


def _check_blocks(values: dict[str, Any], path: Path) -> None:
    """Refuse blocks that this module reads and that are no blocks."""
    zero, optimizer = values.get("zero_optimization", {}), values.get("optimizer", {})
    blocks = {name: values.get(name, {}) for name in BLOCKS}
    if isinstance(zero, dict):
        for name in ("offload_optimizer", "offload_param"):
            blocks[f"zero_optimization.{name}"] = zero.get(name) or {}
        stage = zero.get("stage", 0)
        # True equals 1, and 1.0 does too.
        if type(stage) is not int or stage not in (0, 1, 2, 3):
            raise UserError(f"{path}: 'zero_optimization.stage' is {shown(stage)}; write 0, 1, 2 or 3")
    if isinstance(optimizer, dict):
        blocks["optimizer.params"] = optimizer.get("params", {})
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise UserError(f"{path}: '{name}' is {shown(block)}; write an object, such as {{…}}")


def _refuse_auto(values: dict[str, Any], path: Path, prefix: str = "") -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _refuse_auto(value, path, f"{name}.")
        elif value == "auto" and name not in FILLED:
            raise UserError(f"{path}: '{name}' is \"auto\", which DeepSpeed drops silently; write a value")


def _fill(values: dict[str, Any], key: str, wanted: Any, said: str, path: Path) -> None:
    stated = values.get(key, "auto")
    if stated not in ("auto", wanted):
        raise UserError(f"{path}: '{key}' is {stated}, but {said}; make them agree or remove the key from the JSON")
    values[key] = wanted


def resolve(values: dict[str, Any], path: Path, config: RunConfig, world_size: int) -> dict[str, Any]:
    """Fill batch sizes, clipping and optimizer from the run's settings.

    The engine is told micro-batch 1 and accumulation 1: rows are packed into as many micro-steps as each step needs,
    the trainer sets the accumulation boundary itself, and the loss carries the scale of the whole step.

    Raises:
        UserError: the JSON contradicts a setting; the message names both.
    """
    filled = deepcopy(values)
    rows = config.rows_per_step
    _fill(filled, "train_batch_size", rows, f"the run has {rows} rows an optimizer step (--global_batch_size)", path)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        said = "rows are packed by --micro_batch_tokens into as many micro-steps as a step needs"
        _fill(filled, key, 1, said, path)
    # DeepSpeed asserts train = micro · accumulation · ranks; the contract of `rows` is the trainer's own.
    filled["train_batch_size"] = world_size
    _fill(filled, "gradient_clipping", config.max_grad_norm, f"--max_grad_norm is {config.max_grad_norm}", path)
    _fill_optimizer(filled, path, config)
    filled.setdefault("steps_per_print", 1 << 30)
    return filled


def _fill_optimizer(filled: dict[str, Any], path: Path, config: RunConfig) -> None:
    block = filled.setdefault("optimizer", {"type": "AdamW"})
    if block.get("type") not in ("AdamW", "Adam"):
        raise UserError(f"{path}: optimizer type {shown(block.get('type'))}; this trainer runs 'AdamW'")
    params = block.setdefault("params", {})
    for key, value in params.items():
        if key not in OPTIMIZER_PARAMS:
            raise UserError(f"{path}: AdamW has no parameter '{key}'{closest(key, OPTIMIZER_PARAMS)}; remove it")
        if key == "torch_adam" and not isinstance(value, bool):
            raise UserError(f"{path}: 'optimizer.params.torch_adam' is {shown(value)}; write true or false")
    for key, flag, value in (
        ("lr", "learning_rate", config.learning_rate),
        ("betas", "adam_beta1/--adam_beta2", [config.adam_beta1, config.adam_beta2]),
        ("eps", "adam_eps", config.adam_eps),
        ("weight_decay", "weight_decay", config.weight_decay),
    ):
        _fill(params, key, value, f"--{flag} is {value}", path)
    block["type"] = "AdamW"
    # torch's AdamW compiles nothing at the first start; the offloaded step needs DeepSpeed's own.
    params.setdefault("torch_adam", offload_device(filled, "optimizer") == "none")
    if params["torch_adam"]:
        # One pass over weights and moments in place of ten, on GPUs and CPUs alike.
        params.setdefault("fused", not {"foreach", "capturable"} & params.keys())


def fill_limits(values: dict[str, Any], elements: int) -> None:
    """Write `elements` where a resolved JSON leaves ZeRO-3's limits to the model ("auto": two layers).

    DeepSpeed itself drops `"auto"` and takes its default of 10⁹: half a layer too little for the 72B, four of the
    7B.
    """
    zero = values.get("zero_optimization", {})
    zero |= {key: elements for key in LIMITS if zero.get(key) == "auto"}


def compute_dtype(values: dict[str, Any]) -> str:
    """Return the dtype of the weights in the forward: "bfloat16" or "float32"."""
    return "bfloat16" if values.get("bf16", {}).get("enabled") else "float32"


def products_in_bf16(values: dict[str, Any]) -> bool:
    """Tell whether matrices are multiplied in bfloat16, float32 weights under torch_autocast too."""
    return compute_dtype(values) == "bfloat16" or bool(values.get("torch_autocast", {}).get("enabled"))


def zero_stage(values: dict[str, Any]) -> int:
    """Return the ZeRO stage the JSON asks for."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offload_device(values: dict[str, Any], name: str) -> str:
    """Return where "param" or "optimizer" lies: "none" (the GPU) or "cpu"."""
    block = values.get("zero_optimization", {}).get(f"offload_{name}") or {}
    return str(block.get("device", "none"))
