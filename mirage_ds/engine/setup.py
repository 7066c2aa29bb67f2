"""Starting up: the process group, agreement between ranks, the DeepSpeed engine."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mirage_ds.config.run import RunConfig
from mirage_ds.engine.ds_config import compute_dtype, zero_stage
from mirage_ds.engine.place import is_rank
from mirage_ds.engine.private import (
    held_whole,
    set_collective_timeout,
    skip_steps_that_are_not_finite,
    store_of_group,
    use_plain_gloo,
)
from mirage_ds.engine.waiting import Waiting
from mirage_ds.errors import UserError, reason, shown
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.layers import DecoderLayers

Result = TypeVar("Result")

# How long ranks wait for each other before the first step; the guards' --start is the same.
START_S = 3600.0


class World(NamedTuple):
    """This process among the others.

    Attributes:
        waiting: how they wait for each other until the first step is done.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    waiting: Waiting


# A GPU's device node: it is there whether or not torch can use the GPU.
GPU_NODE = Path("/dev/nvidiactl")


def check_accelerator(device_name: str, gpu_node: Path = GPU_NODE) -> None:
    """Refuse to train on the CPU of a machine that has a GPU, unless the user has asked for it.

    DeepSpeed falls back to the CPU without a word where torch does not see the GPU.

    Args:
        device_name: what DeepSpeed has chosen.

    Raises:
        UserError: names the wheel and the driver that are needed.
    """
    if device_name == "cpu" and "DS_ACCELERATOR" not in os.environ and gpu_node.exists():
        raise UserError(
            f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use: PyPI's torch wheel is built "
            "for CUDA 13 and needs driver 580.65 or newer, PyTorch's cu126 wheel driver 560.28 or newer, a +cpu wheel "
            "never works; install the one that fits `nvidia-smi` (older drivers: update), or set DS_ACCELERATOR=cpu"
        )


def join(bound: float = START_S) -> World:
    """Join the process group the launcher describes; alone, make one of a single rank.

    Args:
        bound: seconds that a rank waits while no other one comes on, in collectives too.

    Raises:
        UserError: the environment is none of the two (place.is_rank), or the GPU cannot be used.
    """
    launched = is_rank(os.environ)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if not launched:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    use_plain_gloo()
    accelerator = get_accelerator()
    check_accelerator(accelerator.device_name())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    set_collective_timeout(bound)
    device = torch.device(accelerator.current_device_name())
    rank, size = dist.get_rank(), dist.get_world_size()
    waiting = Waiting(store_of_group(bound), rank, size, bound)
    waiting.watch()
    return World(rank, size, local_rank, device, waiting)


def from_rank_zero(make: Callable[[], Result], world: World) -> Result:
    """Run `make` on rank 0 and give every rank its result; a UserError there is raised on every rank.

    Checks of files and records belong here: done once, and no rank is left waiting for one that has given up.
    """
    outcome: list[Any] = [None]
    if world.rank == 0:
        try:
            outcome = [make()]
        except UserError as error:
            error.everywhere = True
            outcome = [error]
    world.waiting.meet()
    dist.broadcast_object_list(outcome, src=0, device=world.device if world.device.type == "cuda" else None)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def trouble_of(work: Callable[[], object]) -> str | None:
    """Do file work; say why it failed, None where it did not."""
    try:
        work()
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return None


def at_rank_zero(work: Callable[[], object], world: World) -> str | None:
    """Do file work on rank 0; say on every rank why it failed."""
    return from_rank_zero(lambda: trouble_of(work), world)


def agree(flag: bool, world: World) -> bool:
    """Tell, on every rank alike, whether the flag is up on any of them."""
    world.waiting.meet()
    raised = torch.tensor(float(flag), device=world.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def everyone(own: list[Result], world: World) -> list[Result]:
    """Join the lists of all ranks, in the order of ranks; every rank gets the whole."""
    lists: list[list[Result]] = [[] for _ in range(world.size)]
    world.waiting.meet()
    dist.all_gather_object(lists, own)
    return [item for one in lists for item in one]


@contextmanager
def shared_fate(world: World | None) -> Iterator[None]:
    """Raise a UserError of any rank on all of them, so that none waits for one that has given up."""
    fault = ""
    try:
        yield
    except UserError as error:
        if world is None:
            raise
        fault = str(error)
    if world is not None:
        found = everyone([fault] if fault else [], world)
        if found:
            raise UserError(found[0])


# What a block of a wrong type leads DeepSpeed to, where it has no schema.
STUMBLES = (ValueError, TypeError, AttributeError, KeyError, AssertionError)


def check_ds_config(values: dict[str, Any], path: Path) -> None:
    """Let DeepSpeed itself read a resolved configuration, before anything is loaded or claimed.

    Raises:
        UserError: names the key that it refuses, or says what it stumbles over.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(deepcopy(values))
    except ValidationError as error:
        first = error.errors()[0]
        block, key = error.title.removeprefix("DeepSpeed").removesuffix("Config"), ".".join(map(str, first["loc"]))
        if not key:
            # Of the block as a whole.
            raise UserError(f"{path}: DeepSpeed refuses the block {block}: {first['msg']}; change it") from None
        raise UserError(
            f"{path}: DeepSpeed refuses '{key}' (block {block}) with {shown(first['input'])}: {first['msg']}; fix it"
        ) from None
    except (DeepSpeedConfigError, *STUMBLES) as error:
        raise UserError(
            f"{path}: DeepSpeed cannot read it ({reason(error)}); compare its blocks with those of the shipped JSONs"
        ) from None


def try_engine(values: dict[str, Any], path: Path) -> None:
    """Start an engine of a few numbers as a resolved configuration says: DeepSpeed checks much only there.

    All ranks call it, before anything is loaded or claimed.

    Raises:
        UserError: says what DeepSpeed stumbles over.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    tried = deepcopy(values)
    # Neither files nor buffers of the real size for a few numbers.
    for block in ("tensorboard", "csv_monitor", "flops_profiler", "comms_logger", "dump_state", "wall_clock_breakdown"):
        tried.pop(block, None)
    zero = tried.get("zero_optimization", {})
    # DeepSpeed makes its groups once in the life of a process, and takes more than there are ranks for all of them.
    shards, ranks = zero.pop("zero_hpz_partition_size", 1), dist.get_world_size()
    if ranks % max(1, min(shards, ranks)):
        raise UserError(
            f"{path}: 'zero_optimization.zero_hpz_partition_size' {shards} does not divide the {ranks} ranks of this "
            "run; write the ranks of a host"
        )
    zero |= {
        key: 1024
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "sub_group_size")
        if zero.get("stage")
    }
    model = nn.utils.skip_init(nn.Linear, 16, 16, dtype=getattr(torch, compute_dtype(values)))
    for parameter in model.parameters():
        # Not drawn: torch's generator is left as it is.
        nn.init.zeros_(parameter)
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=weight_decay_groups(model, 0.01), config=tried)
        engine.backward(
            engine(torch.zeros(1, 16, device=engine.device, dtype=engine.module.weight.dtype)).float().sum()
        )
        engine.step()
    # Whatever DeepSpeed's checks raise. Subclasses of RuntimeError are no room on the GPU, or a rank that is gone.
    except (DeepSpeedConfigError, ZeRORuntimeException, RuntimeError, ImportError, *STUMBLES) as error:
        other = isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError)
        if other or isinstance(error, UnicodeError):
            raise
        raise UserError(f"{path}: DeepSpeed cannot start with it ({reason(error)}); change that key") from None
    engine.destroy()


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices (adapters too) decay, norms and biases (one-dimensional) do not.

    A group that would be empty is left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter's own shape is empty; DeepSpeed keeps the true one in ds_shape.
    dimensions = [len(getattr(p, "ds_shape", p.shape)) for p in trained]
    matrices = [p for p, size in zip(trained, dimensions, strict=True) if size > 1]
    vectors = [p for p, size in zip(trained, dimensions, strict=True) if size <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _gather_by_layer(layers: DecoderLayers) -> None:
    """Let ZeRO-3 gather a layer's parameters around its LayerCall, if it does not keep them whole."""
    import deepspeed

    for call, parameters in layers.parameters_of_calls():
        for parameter in parameters:
            deepspeed.zero.register_external_parameter(call, parameter)
    everything = [parameter for _, parameters in layers.parameters_of_calls() for parameter in parameters]
    layers.resident = partial(held_whole, everything)


def make_reference(model: MirageModel, ds_config: dict[str, Any], device: torch.device) -> Any:
    """Make a frozen model ready to be called as the trained one is: under ZeRO-3 in an engine that gathers its weights.

    Args:
        ds_config: the resolved configuration of the trained one.
        device: where it runs; only an engine would put it there by itself.
    """
    import deepspeed

    model.requires_grad_(False)
    if zero_stage(ds_config) != 3:
        return model.to(device)
    _gather_by_layer(model.layers)
    values = {key: deepcopy(value) for key, value in ds_config.items() if key != "optimizer"}
    # It is called once a rollout: nothing of it stays whole, or lies with an optimizer.
    for key in ("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "offload_optimizer"):
        values["zero_optimization"].pop(key, None)
    engine, *_ = deepspeed.initialize(model=model, config=values)
    return engine


def make_engine(model: MirageModel, config: RunConfig, ds_config: dict[str, Any], steps: int) -> Any:
    """Wrap the model in a DeepSpeed engine with AdamW and the learning-rate schedule of `steps` optimizer steps."""
    import deepspeed
    from transformers import get_scheduler

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)

    if zero_stage(ds_config) == 3:
        _gather_by_layer(model.layers)
    if zero_stage(ds_config) == 0 and compute_dtype(ds_config) == "float32":
        # run.step.apply_gradients clips by the norm that it has; DeepSpeed would take it again, and multiply by 1 too.
        ds_config = ds_config | {"gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=weight_decay_groups(model, config.weight_decay),
        lr_scheduler=schedule,
        config=ds_config,
    )
    skip_steps_that_are_not_finite(engine)
    return engine
