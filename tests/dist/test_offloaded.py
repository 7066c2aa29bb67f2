"""Offloading to the host's memory on two ranks: the losses of plain ZeRO-3, and the refusal on every rank.

test_planned.py counts what is offloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.extensions import compiled, use_folder
from support.group import Group

from mirage_ds.config.run import RunConfig
from mirage_ds.engine.checkpoint import CheckpointWriter
from mirage_ds.engine.offload import check_offload
from mirage_ds.errors import UserError
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run
from mirage_ds.train import open_run

BASE: dict[str, Any] = dict(
    stage="stage2", latent_size=2, global_batch_size=4, micro_batch_size=1, max_steps=3, warmup_steps=0,
    lr_scheduler="constant", learning_rate=1e-3, adam_eps=1e-3, num_workers=0, report_to=["none"],
)  # fmt: skip
# Rounding of fp32 in another order (torch's AdamW against DeepSpeed's), three steps on.
FP32 = 1e-6
CPU: dict[str, Any] = {"device": "cpu", "pin_memory": False}


def _train(world: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Train through open_run and step, and save."""
    # The rank may be older than what has been compiled.
    use_folder()
    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = open_run(run)
    losses = []
    for plan, batches in data.loader.steps(0, data.steps):
        taken = steps.step(run, data, learner, plan, batches)
        assert taken.applied
        losses.append(taken.metrics["loss"])
    adam = type(learner.engine.optimizer.optimizer).__name__
    saved = CheckpointWriter(learner.engine, config.save_model_path / "checkpoints", {"step": 3}, world).finish(1)
    learner.engine.destroy()
    return dict(losses=losses, adam=adam, saved=saved)


def _norms(world: Any, settings: dict[str, Any]) -> list[tuple[float, float]]:
    """Train; the loss and the gradient's norm of each step."""
    run = Run(RunConfig(**settings), world)
    data, learner = open_run(run)
    taken = [steps.step(run, data, learner, *given) for given in data.loader.steps(0, data.steps)]
    learner.engine.destroy()
    return [(one.metrics["loss"], one.metrics["grad_norm"]) for one in taken]


@pytest.fixture(scope="module")
def train(
    group: Group, nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[dict[str, Any]]]:
    compiled("CPUAdamBuilder")
    scratch = tmp_path_factory.mktemp("offload")

    def run(name: str, **zero: Any) -> list[dict[str, Any]]:
        path = scratch / f"{name}.json"
        sharded = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
        path.write_text(json.dumps({"zero_optimization": sharded | zero}))
        settings = BASE | dict(
            model=str(nano), data_path=mixed, save_model_path=scratch / name / "out", cache_dir=scratch / "cache",
            feature_dir=scratch / "features", deepspeed=path,
        )  # fmt: skip
        return group.run(_train, settings, timeout_s=240)

    return run


# One of DeepSpeed's extensions is compiled first.
@pytest.mark.slow
def test_losses_of_cpu_offload(train: Callable[..., list[dict[str, Any]]]) -> None:
    plain = train("plain")[0]["losses"]
    # Both at once with torch's AdamW is what the recipe does on a CPU (test_ds_configs.py).
    for name, zero, adam in (
        ("parameters", dict(offload_param=CPU), "AdamW"),
        ("both", dict(offload_param=CPU, offload_optimizer=CPU), "DeepSpeedCPUAdam"),
    ):
        for found in train(name, **zero):
            assert found["losses"] == pytest.approx(plain, rel=FP32)
            assert found["adam"] == adam
            assert found["saved"].place.is_dir()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("stage", "given"),
    # A head of its own, and rows of it, have no part in the earlier passes' backward, which is a step's last one. Under
    # ZeRO-2 a micro-step without latents, of one backward, is before one of two.
    [(3, {"untied": True}), (2, {"untied": True}), (2, {}), (3, {"untied": True, "lora_rank": 2})],
)
def test_an_offloaded_optimizer_takes_whole_gradients(
    stage: int, given: dict[str, Any], ranks: int, group: Group, one_rank: Group, nano: Path, untied: Path, mixed: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = []
    for name, more in (("plain", {}), ("offloaded", {"offload_optimizer": CPU})):
        path, zero = tmp_path / f"{name}.json", {"stage": stage, "overlap_comm": False}
        zero |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        # The same AdamW in both.
        adam = {"type": "AdamW", "params": {"torch_adam": True}}
        path.write_text(json.dumps({"zero_optimization": zero | more, "optimizer": adam}))
        settings = BASE | dict(
            model=str(untied if given.get("untied") else nano), data_path=mixed, save_model_path=tmp_path / name,
            global_batch_size=8, micro_batch_size=4 // ranks, max_grad_norm=0, cache_dir=tmp_path / "cache",
            deepspeed=path,
        )  # fmt: skip
        settings |= {key: value for key, value in given.items() if key != "untied"}
        found.append((one_rank if ranks == 1 else group).run(_norms, settings, timeout_s=240))
    plain, offloaded = found
    for one, other in zip(plain, offloaded, strict=True):
        assert other == [pytest.approx(step, rel=1e-5) for step in one]


def _refused(world: Any, elements: int) -> str | None:
    values = {"zero_optimization": {"stage": 3, "offload_optimizer": CPU}}
    try:
        check_offload(values, Path("x.json"), [elements], world)
    except UserError as error:
        return str(error)
    return None


def test_every_rank_is_refused_alike(group: Group) -> None:
    assert group.run(_refused, 1000) == [None, None]
    one, other = group.run(_refused, 10**15)
    assert one == other
    assert str(one).startswith("x.json: offloading takes 10000000.0 GB of memory a rank at least, ")
