"""How often ZeRO-3's hooks run in the decoder's layers: what they cost the host is most of a short pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.group import Group

from mirage_ds.config.run import RunConfig
from mirage_ds.engine import ds_config as ds
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run
from mirage_ds.train import open_run

K, LAYERS = 2, 2
PASSES = K + 1
WAYS = ("forward", "backward")


def _count(world: Any, settings: dict[str, Any]) -> list[dict[tuple[str, str], int]]:
    """Train; of each step, (forward or backward, module) → how often DeepSpeed's hook has run before it."""
    run = Run(RunConfig(**settings), world)
    data, learner = open_run(run)
    offload = learner.engine.optimizer.parameter_offload
    names = {module: name for name, module in learner.engine.module.named_modules()}
    found = []
    for plan, batches in data.loader.steps(0, data.steps):
        seen: Counter[tuple[str, str]] = Counter()

        def patched(way: str, seen: Counter = seen) -> Any:
            name = f"pre_sub_module_{way}_function"
            own = getattr(offload, name)

            def counted(module: Any) -> None:
                seen[way, names[module]] += 1
                own(module)

            return mock.patch.object(offload, name, counted)

        with patched("forward"), patched("backward"):
            steps.step(run, data, learner, plan, batches)
        found.append(dict(seen))
    learner.engine.destroy()
    return found


@pytest.mark.parametrize(
    ("recipe", "checkpointing", "calls"),
    [
        ("zero3_kept", True, (0, 0)),
        ("zero3_kept", False, (0, 0)),
        # Recomputed, a layer is gathered a second time.
        ("zero3", True, (2 * PASSES, PASSES)),
        ("zero3", False, (PASSES, PASSES)),
    ],
)
def test_hooks_run_once_a_layer_and_pass_or_not_at_all(
    group: Group, nano: Path, mixed: Path, tmp_path: Path, recipe: str, checkpointing: bool, calls: tuple[int, int]
) -> None:
    settings = dict(
        model=str(nano), stage="stage2", data_path=mixed, latent_size=K, global_batch_size=8, micro_batch_size=4,
        max_steps=2, warmup_steps=0, num_workers=0, report_to=["none"], save_model_path=tmp_path / "run",
        cache_dir=tmp_path / "cache", gradient_checkpointing=checkpointing,
        deepspeed=ds.shipped_folder() / f"{recipe}.json",
    )  # fmt: skip
    wanted = {
        (way, f"layers.calls.{layer}"): number
        for way, number in zip(WAYS, calls, strict=True)
        for layer in range(LAYERS)
        if number
    }
    for rank in group.run(_count, settings):
        assert len(rank) == 2
        for step in rank:
            # Not one of the modules inside of a layer.
            assert {key: number for key, number in step.items() if "layers" in key[1]} == wanted
            # It is DeepSpeed's hooks that are counted: the embedding has them.
            assert step["forward", "language_model.embed_tokens"] == 1
