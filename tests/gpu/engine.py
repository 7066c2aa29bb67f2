"""One optimizer step through the trainer, with a shipped JSON, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.engine import ds_config as ds
from mirage_ds.plan.settings import read_settings
from mirage_ds.plan.shape import read_shape, sizes, trained_parameters
from mirage_ds.plan.states import States, states
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run

SETTINGS: dict[str, Any] = dict(
    latent_size=2, global_batch_size=4, micro_batch_size=2, max_steps=1, warmup_steps=0, learning_rate=1e-3,
    num_workers=0, report_to=["none"], overwrite=True,
)  # fmt: skip


class Stepped(NamedTuple):
    """What a step came to.

    Attributes:
        loss, norm: of it; applied: whether the optimizer took it.
        dtype: of the weights in the forward; backend: of the attention.
        held: bytes on the GPU once the step is over, beyond those before the run; 0 on the CPU.
    """

    loss: float
    norm: float
    applied: bool
    dtype: str
    backend: str
    held: int


def take(world: Any, settings: dict[str, Any]) -> Stepped:
    """Prepare a run as train.py does and take one step; called on the rank (tests/support/group.py)."""
    on_gpu = world.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    run = Run(RunConfig(**settings), world)
    data, learner = train.open_run(run)
    try:
        plan, batches = next(iter(data.loader.steps(0, 1)))
        taken = steps.step(run, data, learner, plan, batches)
        del taken.ran[:], batches
        held = torch.cuda.memory_allocated() - before if on_gpu else 0
        model = learner.engine.module
        dtype, backend = str(next(model.parameters()).dtype), model.how.attention
        return Stepped(taken.metrics["loss"], taken.metrics["grad_norm"], taken.applied, dtype, backend, held)
    finally:
        learner.engine.destroy()


def planned_states(model: Path, json_path: Path) -> States:
    """Compute the model states of the only rank."""
    shape = read_shape(str(model))
    settings = read_settings(ds.read_json(json_path), json_path, sizes(shape))
    return states(trained_parameters(shape), settings, ranks=1)


def alone() -> list[str]:
    """Name the recipes that a single rank can run: all but those whose hpZ group has several."""
    found = {path.stem: ds.read_json(path) for path in ds.recipes()}
    return [name for name, values in found.items() if "zero_hpz_partition_size" not in values["zero_optimization"]]
