"""Every recipe as a CPU runs it, on two ranks: the same losses as plain ZeRO-3 in the same stage.

That plain ZeRO-3 is right stands in test_zero3.py, and what each JSON gathers in test_traffic.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.group import Group

from mirage_ds.config.run import RunConfig
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.setup import check_ds_config, try_engine
from mirage_ds.errors import UserError
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run
from mirage_ds.train import open_run

BASE: dict[str, Any] = dict(
    latent_size=2, global_batch_size=4, micro_batch_size=2, max_steps=3, warmup_steps=0, learning_rate=1e-3,
    num_workers=0, report_to=["none"], overwrite=True,
)  # fmt: skip
PLAIN = "zero3"
# The recurrent stage with each recipe; of the others, whose forward is one pass, those that differ from it by more than
# ZeRO's own work.
CASES = [("stage2", path.stem) for path in ds.recipes()] + [("stage1", "zero3_kept"), ("sft", "zero2")]
# The same numbers in the same order, summed by another collective or by one rank: rounding of float32 alone.
FP32 = 1e-5
# bf16 keeps 8 bits: 2⁻⁸ a rounding, some of which do not cancel in a mean over tokens.
BF16 = 2e-2


def _train(world: Any, settings: dict[str, Any]) -> list[tuple[float, float]]:
    """Train; the loss and the gradient's norm of each step. AdamW alone would not show a gradient of another scale."""
    from deepspeed.utils import groups

    # DeepSpeed expects one such group in the life of a process.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = open_run(run)
    steps_taken = []
    for plan, batches in data.loader.steps(0, data.steps):
        taken = steps.step(run, data, learner, plan, batches)
        assert taken.applied
        steps_taken.append((taken.metrics["loss"], taken.metrics["grad_norm"]))
    learner.engine.destroy()
    return steps_taken


Train = Callable[[str, str], list[tuple[float, float]]]


@pytest.fixture(scope="module")
def train(nano: Path, mixed: Path, helped: Path, group: Group, tmp_path_factory: pytest.TempPathFactory) -> Train:
    scratch = tmp_path_factory.mktemp("configs")
    done: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def run(stage: str, name: str) -> list[tuple[float, float]]:
        if (stage, name) not in done:
            settings = BASE | dict(
                model=str(nano), stage=stage, data_path=helped if stage == "stage1" else mixed,
                deepspeed=ds.shipped_folder() / f"{name}.json", save_model_path=scratch / "run",
                cache_dir=scratch / "cache",
            )  # fmt: skip
            own, others = group.run(_train, settings, timeout_s=240)
            assert own == others
            done[stage, name] = own
        return done[stage, name]

    return run


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_a_recipe_trains_as_plain_zero3_does(stage: str, name: str, train: Train) -> None:
    plain, found = train(stage, PLAIN), train(stage, name)
    # At this rate the losses fall, so that a step that is not taken shows.
    assert plain[0][0] - plain[-1][0] > 0.1
    tolerance = BF16 if "bf16" in name else FP32
    # From the second step on bf16 master weights are other weights: gradients need not agree, losses still do.
    assert found[0] == pytest.approx(plain[0], rel=tolerance)
    for (loss, norm), (wanted, wanted_norm) in zip(found[1:], plain[1:], strict=True):
        assert loss == pytest.approx(wanted, rel=tolerance)
        assert "bf16" in name or norm == pytest.approx(wanted_norm, rel=tolerance)


# What DeepSpeed's configuration classes let pass and its engine does not.
REFUSED_BY_THE_ENGINE = (
    ({"data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype='fp16' conflicts"),
    ({"data_types": {"grad_accum_dtype": "fp8"}}, "'fp8' is not a valid"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "not been implemented on CPU"),
    ({"optimizer": {"type": "AdamW", "params": {"fused": True, "foreach": True}}}, "cannot be `True` together"),
)


def _tried(world: Any, files: list[Path]) -> list[str]:
    """What the engine says to each JSON; nothing where it starts."""
    del world
    said = []
    for file in files:
        settings = RunConfig(model="m", stage="sft", data_path="d", save_model_path="o")
        values = ds.resolve(ds.read_json(file, "cpu"), file, settings, 2)
        check_ds_config(values, file)
        try:
            try_engine(values, file)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def test_a_json_that_the_engine_refuses_is_one_sentence_on_every_rank(group: Group, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.json" for number in range(len(REFUSED_BY_THE_ENGINE))]
    for file, (values, _) in zip(files, REFUSED_BY_THE_ENGINE, strict=True):
        file.write_text(json.dumps(values))
    for said in group.run(_tried, files):
        for file, sentence, (_, why) in zip(files, said, REFUSED_BY_THE_ENGINE, strict=True):
            assert sentence.startswith(f"{file}: ")
            assert why in sentence
            assert "\n" not in sentence
