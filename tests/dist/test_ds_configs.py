"""Every shipped JSON that runs on the CPU, on two ranks: the same losses as plain ZeRO-3 in the same stage.

That plain ZeRO-3 is right stands in test_zero3.py, and what each JSON gathers in test_traffic.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.extensions import compiled, use_folder
from support.group import Group

from mirage_ds.config.run import RunConfig
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.setup import check_ds_config, try_engine
from mirage_ds.errors import UserError
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run
from mirage_ds.train import open_run

STAGES = ("sft", "stage1", "stage2")
BASE: dict[str, Any] = dict(
    latent_size=2, global_batch_size=4, micro_batch_size=2, max_steps=3, warmup_steps=0, learning_rate=1e-3,
    num_workers=0, report_to=["none"], overwrite=True,
)  # fmt: skip
ALL = sorted(path.stem.removesuffix("_cpu") for path in ds.shipped_folder().glob("*_cpu.json"))
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


Train = Callable[[str], list[tuple[float, float]]]


@pytest.fixture(scope="module")
def train(
    nano: Path, mixed: Path, helped: Path, group: Group, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Train]:
    # Before the ranks start.
    use_folder()
    scratch = tmp_path_factory.mktemp("configs")
    done: dict[str, list[tuple[float, float]]] = {}

    def run(name: str) -> list[tuple[float, float]]:
        if name not in done:
            if name.endswith("_nvme"):
                compiled("AsyncIOBuilder")
            stage = name.partition("_")[0]
            values = json.loads((ds.shipped_folder() / f"{name}_cpu.json").read_text())
            for block in ("offload_param", "offload_optimizer"):
                if "nvme_path" in values["zero_optimization"].get(block, {}):
                    values["zero_optimization"][block]["nvme_path"] = str(scratch / "nvme")
                    (scratch / "nvme").mkdir(exist_ok=True)
            path = scratch / f"{name}.json"
            path.write_text(json.dumps(values))
            settings = BASE | dict(
                model=str(nano), stage=stage, data_path=helped if stage == "stage1" else mixed, deepspeed=path,
                save_model_path=scratch / "run", cache_dir=scratch / "cache",
            )  # fmt: skip
            own, others = group.run(_train, settings, timeout_s=240)
            assert own == others
            done[name] = own
        return done[name]

    yield run
    # Nothing is left of the runs' files.
    assert not list(scratch.glob("nvme/mirage_ds-*"))


# NVMe compiles one of DeepSpeed's extensions first; of sft and stage1, whose files are alike, the default alone is
# quick.
SLOW = {name for name in ALL if name.endswith("_nvme") or not name.startswith("stage2")} - {"sft", "stage1"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALL])
def test_a_shipped_json_trains_as_plain_zero3_does(name: str, train: Train) -> None:
    stage = name.partition("_")[0]
    plain, found = train("stage2_released" if stage == "stage2" else stage), train(name)
    # At this rate the losses fall, so that a step that is not taken shows.
    assert plain[0][0] - plain[-1][0] > 0.1
    tolerance = BF16 if "bf16" in name else FP32
    # From the second step on bf16 master weights are other weights: gradients need not agree, losses still do.
    assert found[0] == pytest.approx(plain[0], rel=tolerance)
    for (loss, norm), (wanted, wanted_norm) in zip(found[1:], plain[1:], strict=True):
        assert loss == pytest.approx(wanted, rel=tolerance)
        assert "bf16" in name or norm == pytest.approx(wanted_norm, rel=tolerance)


def test_every_stage_has_every_budget_with_its_twin() -> None:
    budgets = {"", "_hpz", "_offload", "_nvme", "_bf16_states", "_zero1", "_zero2"}
    for stage in STAGES:
        other = "_released" if stage == "stage2" else "_kept"
        assert {name.removeprefix(stage) for name in ALL if name.partition("_")[0] == stage} == budgets | {other}
    names = {path.stem for path in ds.shipped_folder().glob("*.json")}
    assert names == {*ALL, *(f"{name}_cpu" for name in ALL)}


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
        values = ds.resolve(ds.read_json(file), file, settings, 2)
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
    good = [ds.shipped_folder() / f"stage2{name}_cpu.json" for name in ("", "_hpz", "_zero1", "_zero2", "_bf16_states")]
    for said in group.run(_tried, [*files, *good]):
        assert said[len(files) :] == [""] * len(good)
        for file, sentence, (_, why) in zip(files, said, REFUSED_BY_THE_ENGINE, strict=False):
            assert sentence.startswith(f"{file}: ")
            assert why in sentence
            assert "\n" not in sentence
