"""What a step gathers and reduces, counted on two ranks, against the bounds of docs/scaling.md.

Ψ is the number of sharded elements; k latents a run. The model's layers hold 92 % of Ψ; released parameters all are
sharded, the persistence threshold is 0. Some rows have no latents; the ranks hold different numbers of rows and tokens.
As with 8,192 tokens a micro-batch, stage2's last pass has a backward of its own where nothing else is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.group import Group
from support.models import make_nano
from torch.profiler import ProfilerActivity, profile

from benchmarks.listen import listening
from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.engine import ds_config as ds
from mirage_ds.plan.formulas import Volume, step_calls, volume, walk
from mirage_ds.plan.settings import Zero3, two_layers
from mirage_ds.plan.shape import Sizes, read_shape, sizes
from mirage_ds.run import step as steps
from mirage_ds.run.settings import Run
from mirage_ds.run.validation import evaluate

LAYERS = 4
# 3 rows a step, at most 2 a micro-step and rank: one micro-step of 2 rows on one rank and 1 on the other.
BASE: dict[str, Any] = dict(
    global_batch_size=3, micro_batch_size=2, max_steps=2, num_workers=0, report_to=["none"], warmup_steps=0,
    overwrite=True,
)  # fmt: skip
AHEAD = "stage3_prefetch_bucket_size"


class How(NamedTuple):
    """What a run does beside its settings.

    Attributes:
        split: the last pass has a backward of its own.
        passes: of each step, in place of the run's.
        evaluate_after: the step after which the evaluation runs.
        wire: torch's profiler watches the last step.
    """

    split: bool = True
    passes: tuple[int, ...] = ()
    evaluate_after: int | None = None
    wire: bool = False


class Counts(NamedTuple):
    """Of one rank, by micro-step.

    Attributes:
        gathered, node, reduced: elements: all gathers, those inside hpZ's group, gradients.
        step, step_calls: elements and collectives of the gathers at the end of an optimizer step.
        layers: most layers whole at one time.
        recorded: micro-steps that recorded the order of the parameters.
        rows, runs: rows and latent runs of this rank.
        losses: of every step.
        wire: elements that torch's profiler saw in the collectives of the last step: (all-gather, reduce-scatter).
    """

    gathered: list[int]
    node: list[int]
    reduced: list[int]
    step: list[int]
    step_calls: list[int]
    layers: list[int]
    recorded: list[int]
    rows: list[int]
    runs: list[int]
    losses: list[float]
    wire: tuple[int, int]


def _with_passes(rows: Any, passes: int, k: int, work: tuple[list[int], int]) -> Any:
    """A micro-batch of so many passes, whatever its rows need."""
    return rows.batch((work[0], passes // k), lambda _: passes)


def _count(world: Any, settings: dict[str, Any], how: How) -> Counts:
    """Train as train.py does, and count."""
    from deepspeed.utils import groups

    # DeepSpeed expects one such group in the life of a process.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    assert learner.engine.module.how.split == (config.stage == "stage2")
    learner.engine.module.how.split &= how.split
    rows, runs, losses = [], [], []

    def looked_at(batches: Any) -> Iterator[Any]:
        for batch in batches:
            rows.append(int((batch.rows >= 0).sum()))
            runs.append(int((batch.latent_count[batch.rows >= 0] > 0).sum()))
            yield batch

    with listening(learner.engine) as heard:
        for number in range(data.steps):
            if how.passes:
                data.loader.batch = partial(_with_passes, data.loader.rows, how.passes[number], config.latent_size)
            watched = how.wire and number == data.steps - 1
            ((plan, batches),) = data.loader.steps(number, number + 1)
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) if watched else nullcontext() as seen:
                losses.append(steps.step(run, data, learner, plan, looked_at(batches)).metrics["loss"])
            if number == how.evaluate_after:
                assert data.evaluation is not None
                evaluate(run, learner, data.evaluation)
    learner.engine.destroy()
    numbers = range(heard.now + 1)
    return Counts(
        gathered=[heard.gathered(i) for i in numbers],
        node=[heard.elements[i, "node"] for i in numbers],
        reduced=[heard.elements[i, "reduced"] for i in numbers],
        step=[heard.elements[i, "step"] for i in numbers],
        step_calls=[heard.calls[i, "step"] for i in numbers],
        layers=[heard.layers[i] for i in numbers],
        recorded=heard.recorded,
        rows=rows,
        runs=runs,
        losses=losses,
        wire=_wire(seen.events()) if how.wire else (0, 0),
    )


def _wire(events: Any) -> tuple[int, int]:
    """Elements gathered and scattered according to torch itself: what DeepSpeed's functions were not asked about."""
    found = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 0}
    for event in events:
        if event.name in found:
            whole, part = (torch.Size(shape).numel() for shape in event.input_shapes[:2])
            found[event.name] += max(whole, part)
    return found["c10d::_allgather_base_"], found["c10d::_reduce_scatter_base_"]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four layers: they hold most of Ψ, and could pile up."""
    return make_nano(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(scope="module")
def model(nano: Path) -> Sizes:
    model = sizes(read_shape(str(nano)))
    assert model.layers * model.layer > 0.9 * model.text
    # One matrix for both: the gradients of both backwards have it.
    assert not model.head
    return model


@pytest.fixture(scope="module")
def psi(model: Sizes) -> int:
    return model.text


Counted = Callable[..., list[Counts]]


@pytest.fixture(scope="module")
def run(nano: Path, mixed: Path, helped: Path, group: Group, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    scratch = tmp_path_factory.mktemp("traffic")

    def scaled(name: str) -> Path:
        """A recipe that gathers as far ahead, in the measure of a layer, as it does for the 7B.

        Without this all of nano is gathered ahead, and no limit shows.
        """
        values = ds.read_json(ds.shipped_folder() / f"{name}.json", "cpu")
        own, large = (two_layers(sizes(read_shape(model))) for model in (str(nano), "qwen2.5-vl-7b"))
        if AHEAD in values["zero_optimization"]:
            values["zero_optimization"][AHEAD] = values["zero_optimization"][AHEAD] * own // large
        path = scratch / f"{name}.json"
        path.write_text(json.dumps(values))
        return path

    def make(name: str, k: int = 4, how: How | None = None, stage: str = "stage2", **settings: Any) -> list[Counts]:
        values = BASE | dict(
            model=str(nano), stage=stage, latent_size=k, data_path=helped if stage == "stage1" else mixed,
            save_model_path=scratch / "run", cache_dir=scratch / "cache",
            deepspeed=scaled(name),
        )  # fmt: skip
        return group.run(_count, values | settings, how or How(), timeout_s=200)

    return make


@pytest.fixture(scope="module")
def kept(run: Counted) -> list[Counts]:
    return run("zero3_kept", how=How(wire=True), max_steps=3)


@pytest.fixture(scope="module")
def released(run: Counted) -> list[Counts]:
    return run("zero3", max_steps=3)


@pytest.mark.parametrize("k", [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 8))])
def test_kept_parameters_are_gathered_once_a_step_whatever_k(
    k: int, run: Counted, kept: list[Counts], model: Sizes
) -> None:
    psi = model.text
    for rank in kept if k == 4 else run("zero3_kept", k, max_steps=3):
        # Before the first step they are not there. Until the order is known, what is outside of the layers comes for
        # each use: the embedding, which is the head too, for four, the final norm for two.
        assert rank.gathered == [psi + 3 * model.embedding + model.norm, 0, 0]
        assert rank.step == [psi] * 3
        assert rank.reduced == [2 * psi] * 3


def test_the_rows_are_uneven_and_some_have_no_latents(kept: list[Counts]) -> None:
    own, others = kept
    assert own.rows != others.rows
    assert 0 in own.runs + others.runs
    assert own.runs != others.runs
    assert sum(own.runs) + sum(others.runs) < sum(own.rows) + sum(others.rows)


def test_torch_saw_the_same_elements_travel(kept: list[Counts], psi: int) -> None:
    for rank in kept:
        assert rank.wire == (rank.gathered[-1] + rank.step[-1], rank.reduced[-1]) == (psi, 2 * psi)


@pytest.mark.parametrize(("stage", "name"), [("sft", "zero3"), ("stage1", "zero3"), ("stage1", "zero3_kept")])
def test_one_pass_gathers_what_plain_zero3_does(stage: str, name: str, run: Counted, psi: int) -> None:
    for rank in run(name, stage=stage):
        assert all(0.99 * psi < number <= 2.05 * psi for number in rank.gathered[1:]) or "kept" in name
        assert rank.step == [psi if "kept" in name else 0] * 2
        assert rank.reduced == [psi] * 2


def _released(model: Sizes, k: int) -> Volume:
    return volume(model, walk("stage2", k), Zero3(max_live=two_layers(model), persistence=0))


@pytest.mark.parametrize("k", [2, 4])
def test_released_parameters_cost_two_gathers_a_pass(
    k: int, run: Counted, kept: list[Counts], released: list[Counts], model: Sizes
) -> None:
    most = _released(model, k)
    for rank in released if k == 4 else run("zero3", k):
        for number in rank.gathered[1:]:
            assert number <= (2 * k + 2.1) * model.text
            # The formula is a bound, and a near one.
            assert 0.9 * most.gathered < number <= 1.005 * most.gathered
        assert set(rank.reduced) == {2 * model.text}
        # Of four: in backward the layers must not pile up.
        assert max(rank.layers) <= 3
        assert rank.recorded == [0]
        if k == 4:
            assert rank.losses == kept[0].losses


def test_kept_layers_all_stay(kept: list[Counts]) -> None:
    # The count of whole layers can see more than three.
    assert kept[0].layers == [LAYERS] * 3


def test_weights_that_are_whole_are_gathered_one_by_one(kept: list[Counts], model: Sizes) -> None:
    for rank in kept:
        assert rank.step_calls == [step_calls(model, Zero3(persistence=10**12))] * 3


@pytest.mark.parametrize("name", ["zero3_kept", "zero3", "zero2"])
def test_one_backward_reduces_once(name: str, run: Counted, psi: int) -> None:
    for rank in run(name, 2, How(split=False)):
        assert rank.reduced == [psi] * 2


@pytest.mark.parametrize(
    ("name", "stage", "reduced"), [("zero2", 2, [2, 2, 2, 2]), ("zero1", 1, [0, 1, 0, 1]), ("zero0", 0, [0, 1, 0, 1])]
)
def test_two_backwards_reduce_twice_unless_at_the_boundary(
    name: str, stage: int, reduced: list[int], run: Counted, psi: int, tmp_path: Path
) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": False}}))
    for rank in run("zero3", 2, How(passes=(3, 3)), global_batch_size=6, deepspeed=file):
        assert [round(number / psi, 2) for number in rank.reduced] == reduced


def test_a_kept_step_of_other_passes_costs_nothing(run: Counted, kept: list[Counts], psi: int) -> None:
    # Hooks see neither layers nor passes.
    for rank in run("zero3_kept", 2, How(passes=(3, 3, 5, 3)), max_steps=4):
        assert rank.gathered[1:] == [0, 0, 0]
        assert rank.step == [psi] * 4
        assert rank.recorded == kept[0].recorded


def test_a_released_step_of_other_passes_is_recorded_anew(run: Counted, model: Sizes) -> None:
    few, many = (_released(model, k).gathered for k in (2, 4))
    for rank in run("zero3", 2, How(passes=(3, 3, 5, 5, 5, 3)), max_steps=6):
        # The step that differs stops following the order, the one after it records another.
        assert rank.recorded == [0, 3]
        # Both gather each layer twice a pass all the same, but not ahead.
        assert all(
            0.9 * most < number <= 1.005 * most
            for most, number in zip([few] * 2 + [many] * 3 + [few], rank.gathered, strict=True)
        )
        assert rank.layers[3] == 1 < rank.layers[1] == rank.layers[4]


@pytest.mark.parametrize("name", ["zero3_kept", pytest.param("zero3", marks=pytest.mark.slow)])
def test_an_evaluation_costs_at_most_one_recorded_micro_step(name: str, run: Counted, mixed: Path, psi: int) -> None:
    settings = dict(eval_data_path=mixed, eval_every=1, max_steps=3)
    for rank in run(name, 2, How(evaluate_after=0), **settings):
        # The first micro-step trains, then the evaluation has its own, and the last two train.
        assert [number for number, reduced in enumerate(rank.reduced) if reduced] == [0, *_last_two(rank)]
        assert len(rank.reduced) > 4
        assert len([place for place in rank.recorded if place in _last_two(rank)]) <= 1
        assert rank.gathered[-1] <= (0 if name == "zero3_kept" else 6.1) * psi
        if name == "zero3_kept":
            # What the evaluation has gathered stays for the step after it.
            assert sum(rank.gathered[1:-1]) <= 1.05 * psi


def _last_two(rank: Counts) -> list[int]:
    return [len(rank.gathered) - 2, len(rank.gathered) - 1]


def test_the_frozen_tower_adds_nothing(run: Counted, kept: list[Counts]) -> None:
    for rank, other in zip(run("zero3_kept", feature_cache="off"), kept, strict=True):
        assert rank.gathered == other.gathered[:2]
        assert rank.step == other.step[:2]
        assert rank.reduced == other.reduced[:2]


def test_hpz_crosses_nodes_once_a_step(run: Counted, psi: int) -> None:
    for rank in run("zero3_hpz", 2, global_batch_size=6, max_steps=2):
        crossing = [whole - inside for whole, inside in zip(rank.gathered, rank.node, strict=True)]
        # The first micro-step of each step gathers every parameter once among all ranks; the second none.
        assert crossing[2:] == [psi, 0]
        assert rank.node[2] > 3 * psi
