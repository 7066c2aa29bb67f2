"""The reinforcement stage on ranks: the same steps on one and two and under any ZeRO stage, resumed to the bit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file
from support.group import Group
from support.on_disk import files, lines_of, log_of
from support.records import write_jsonl

from mirage_ds import train
from mirage_ds.config.rl import LatentPolicy
from mirage_ds.config.run import RunConfig
from mirage_ds.engine.setup import make_reference
from mirage_ds.engine.universal import convert
from mirage_ds.errors import Stopped, UserError
from mirage_ds.model.forward import Scoring
from mirage_ds.model.load import load_model
from mirage_ds.rl import loop, step
from mirage_ds.rl.objective import Objective
from mirage_ds.rl.step import Pupil
from mirage_ds.run.heartbeat import Heartbeat
from mirage_ds.run.journal import Journal
from mirage_ds.run.settings import Run, check_settings
from mirage_ds.run.setup import open_model

K, STEPS, EVERY = 2, 4, 2
# Two rollouts of 4 prompts × 3 answers, two steps on each. ε this large makes AdamW's step a smooth function of the
# gradient: see test_zero3.py.
BASE: dict[str, Any] = dict(
    stage="rl", latent_size=K, prompts_per_rollout=4, num_generations=3, max_completion_length=12, updates=EVERY,
    max_steps=STEPS, temperature=1.5, micro_batch_size=3, warmup_steps=0, learning_rate=3e-3, adam_eps=1e-3,
    num_workers=0, report_to=["none"], save_every=EVERY, reward=["rewards_of_rl:varied"], gradient_checkpointing=False,
    reward_workers=1, beta=0.05,
)  # fmt: skip
# A reward that random answers differ in, and that no rank or packing changes.
REWARDS = """
def varied(answers, records, blocks):
    return [len(set(answer)) % 4 + len(own) / 2 for answer, own in zip(answers, blocks)]
"""
MEASURED = ("loss", "grad_norm", "entropy", "kl", "ratio", "drift")
# See test_world_size.py; here also the log-probabilities of two packings meet in a ratio.
NOISE = 5e-6


# ------------------------------------------------------------------------------------------------------- on the ranks


def _train(world: Any, settings: dict[str, Any], stops: int | tuple[str, int] | None = None) -> str | None:
    """Train; the user's mistake as a sentence, or where it stopped.

    Args:
        stops: somebody asks the run to stop at this look for it, from 0; or as this rank does this, for the n-th time.
    """
    looks, marks = 0, 0

    def asked() -> bool:
        nonlocal looks
        looks += 1
        return stops is not None and (marks >= stops[1] if isinstance(stops, tuple) else looks > stops)

    class Marked(Heartbeat):
        def at(self, doing: str, *_: Any, **__: Any) -> None:
            nonlocal marks
            marks += isinstance(stops, tuple) and doing == stops[0]

    # Where the worker processes find the reward.
    sys.path[:] = [str(Path(settings["cache_dir"]).parent), *sys.path]
    try:
        run = Run(RunConfig(**settings), world, Journal(Marked()), asked)
        data, learner = train.open_run(run)
        if stops is not None:
            looks = 0
        train.train(run, data, learner)
    except UserError as error:
        return str(error)
    except Stopped:
        learner.engine.destroy()
        return "stopped"
    learner.engine.destroy()
    return None


def _without_room(world: Any, settings: dict[str, Any]) -> str | None:
    """Train where a rank has a megabyte free."""
    with mock.patch("mirage_ds.engine.whole.free_bytes", return_value=10**6):
        return _train(world, settings)


def _references(world: Any, settings: dict[str, Any]) -> tuple[float, float, int]:
    """Take a rollout's steps, then score the next one's answers by the reference, and by a copy of the start's weights.

    Returns:
        The largest difference between the two, and that of the policy in training from the reference; models held.
    """
    sys.path[:] = [str(Path(settings["cache_dir"]).parent), *sys.path]
    run = Run(RunConfig(**settings), world)
    checked = check_settings(run)
    data, learner = train.open_run(run)
    steps = loop.reinforce(run, data, learner)
    for _ in range(EVERY):
        next(steps)
    lesson = loop.lesson_of(run, loop.roll(run, data, learner, 1))
    steps.close()
    pupil = Pupil(run, data, learner, lesson)
    pupil.score()
    whole = open_model(run, checked._replace(lora=None), data).model
    copy = make_reference(whole, checked.ds_values, world.device)
    away, moved, scoring = [0.0], [0.0], Scoring(run.config.temperature)
    copy.eval()
    with torch.no_grad():
        for micro in (micro for _, micros in pupil.parts for micro in micros):
            batch, _ = pupil.batch(micro)
            wanted = copy(batch, scoring).logp
            away += (micro.reference - wanted).abs().tolist()
            moved += (learner.engine(batch, scoring).logp - wanted).abs().tolist()
    held = 1 + (learner.reference is not None)
    learner.engine.destroy()
    return max(away), max(moved), held


def _both_ways(world: Any, settings: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Take a step of each policy and objective (some, on ranks) by its own forward alone, and after a scoring pass.

    Returns:
        Policy and objective → difference of the losses; of the gradients, as a share of their norm.
    """
    sys.path[:] = [str(Path(settings["cache_dir"]).parent), *sys.path]
    given = Run(RunConfig(**settings), world)
    data, opened = train.open_run(given)
    engine, apply, found = opened.engine, step.apply_gradients, {}
    gradients: list[torch.Tensor] = []

    def applied(*asked: Any) -> Any:
        # Also of heads, which not each micro-step of `through` reaches.
        own = [safe_get_full_grad(one).flatten() for one in engine.module.parameters() if one.requires_grad]
        gradients.append(torch.cat(own))
        return apply(*asked)

    step.apply_gradients = applied
    lesson = loop.lesson_of(given, loop.roll(given, data, opened, 0))
    lesson = lesson._replace(advantages=torch.linspace(-1, 1, len(lesson.answers)))
    # Drawn with heads, the latents serve every policy.
    every = product(get_args(LatentPolicy)[1:], get_args(Objective))
    for policy, objective in islice(every, 0, None, 1 if world.size == 1 else 7):
        run = replace(given, config=given.config.model_copy(update={"objective": objective}))
        learner = opened._replace(state=opened.state | {"latent_policy": policy})
        one, other = (Pupil(run, data, learner, lesson) for _ in range(2))
        one.score()
        with torch.no_grad():
            for micro, batch, drawn in one._batches(one.parts):
                assert micro.old is None
                one._keep(engine(batch, one.scoring), micro, drawn)
        other.score()
        losses = [pupil.update(0, 0).metrics["loss"] for pupil in (one, other)]
        assert one.drift == other.drift
        assert gradients[-2].norm() > 0
        away = float((gradients[-2] - gradients[-1]).norm() / gradients[-2].norm())
        found[f"{policy} {objective}"] = abs(losses[0] - losses[1]), away
    step.apply_gradients = apply
    if data.rewards is not None:
        data.rewards.close()
    engine.destroy()
    return found


# ---------------------------------------------------------------------------------------------------- in this process


class Runs:
    def __init__(self, group: Group, base: dict[str, Any], scratch: Path):
        self.groups, self.base, self.scratch = {2: group, 1: Group(1), 4: Group(4)}, base, scratch

    def train(
        self, out: Path, ranks: int = 2, stops: int | tuple[str, int] | None = None, **settings: Any
    ) -> str | None:
        said = self.groups[ranks].run(_train, self.base | dict(save_model_path=out) | settings, stops, timeout_s=240)
        assert len(set(said)) == 1
        return said[0]


@pytest.fixture(scope="module")
def short(mixed: Path) -> Path:
    """The mixed rows with answers of few tokens, half of which begin with a latent block."""
    rows = [json.loads(line) for line in mixed.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text_output"] = "<output_image>then right" if number % 2 else "left left"
        row.pop("image_output", None)
    return write_jsonl(mixed.parent / "short.jsonl", rows)


@pytest.fixture(scope="module")
def model(nano: Path, short: Path, own_group: Group, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model after some steps of stage2: some of its answers open latent blocks."""
    out = tmp_path_factory.mktemp("rl") / "stage2"
    settings = dict(
        model=str(nano), data_path=short, save_model_path=out, stage="stage2", latent_size=K, max_steps=9,
        global_batch_size=12, learning_rate=5e-3, warmup_steps=0, num_workers=0, report_to=["none"],
        cache_dir=out.parent / "cache",
    )  # fmt: skip
    assert own_group.run(_train, settings, timeout_s=240) == [None, None]
    return out


@pytest.fixture(scope="module")
def runs(model: Path, short: Path, own_group: Group, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    scratch = tmp_path_factory.mktemp("rl_runs")
    (scratch / "rewards_of_rl.py").write_text(REWARDS)
    made = Runs(own_group, BASE | dict(model=str(model), data_path=short, cache_dir=scratch / "cache"), scratch)
    yield made
    made.groups[1].stop()
    made.groups[4].stop()


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """The uninterrupted run."""
    out = runs.scratch / "whole"
    assert runs.train(out) is None
    return out


def sharded(folder: Path, stage: int = 3) -> Path:
    """A JSON of a ZeRO stage under which nothing stays whole."""
    file, kept = folder / "ds.json", {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **kept}}))
    return file


def completions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run/completions.jsonl").read_text().splitlines()]


def test_a_run_samples_scores_and_learns(whole: Path, model: Path) -> None:
    lines, answers = lines_of(whole), completions(whole)
    assert [line["rows"] for line in lines] == [6] * STEPS
    assert len(answers) == 2 * 4 * 3
    # It is no empty run: groups differ in reward, some answers have latents, the weights move, ratios leave 1.
    assert all(line["flat_groups"] < 1 and line["grad_norm"] > 0 for line in lines)
    assert 0 < lines[0]["latent_share"] < 1
    assert any(f"[{K} latents]" in answer["answer"] for answer in answers)
    assert [line["ratio"] == 1 for line in lines] == [True, False, True, False]
    assert [line["kl"] == 0 for line in lines] == [True, False, False, False]
    assert all(line["decoder_drift_max"] <= 1e-5 for line in lines)
    parts = ("decode_seconds", "scoring_seconds", "logp_seconds", "update_seconds")
    assert all(line[name] > 0 for line in lines for name in parts)
    before, after = load_file(model / "model.safetensors"), load_file(whole / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # The model goes on to be one with latents.
    assert json.loads((whole / "config.json").read_text())["mirage"]["stage"] == "rl"
    load_model(whole, stage="sft", dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        (2, {"deepspeed": "zero3"}),
        (2, {"deepspeed": "zero1"}),
        (2, {"gradient_checkpointing": True}),
        # On two cores four ranks take half a minute to start.
        pytest.param(4, {"deepspeed": "zero3"}, marks=pytest.mark.slow),
    ],
)
def test_ranks_zero_stage_and_checkpointing_change_no_step(
    ranks: int, settings: dict[str, Any], runs: Runs, whole: Path, tmp_path: Path
) -> None:
    if name := settings.get("deepspeed"):
        settings = {"deepspeed": sharded(tmp_path, int(name[-1]))}
    assert runs.train(tmp_path / "out", ranks, save_every=None, **settings) is None
    theirs, own = lines_of(whole), lines_of(tmp_path / "out")
    for one, other in zip(theirs, own, strict=True):
        assert {name: one[name] for name in MEASURED} == pytest.approx(
            {name: other[name] for name in MEASURED}, abs=NOISE, rel=NOISE
        )
    for one, other in zip(completions(whole), completions(tmp_path / "out"), strict=True):
        assert one == other | {"advantage": pytest.approx(one["advantage"])}


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs: Runs, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    checkpoints = out / "run/checkpoints"
    shutil.copytree(whole / f"run/checkpoints/global_step{EVERY}", checkpoints / f"global_step{EVERY}")
    (checkpoints / "latest").write_text(f"global_step{EVERY}")
    # It had logged the first step of its second rollout, and that rollout's answers, when it was killed.
    for name, share in (("log.jsonl", EVERY + 1), ("completions.jsonl", 20)):
        lines = (whole / "run" / name).read_text().splitlines(keepends=True)
        (out / "run" / name).write_text("".join(lines[:share]))
    assert runs.train(out, resume="auto") is None
    assert log_of(out) == log_of(whole)
    assert completions(out) == completions(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_that_is_stopped_goes_on_where_it_was(runs: Runs, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    # In an update of the first rollout, which is learnt from to its end; among the second one's tokens, each of which
    # is a look; and while those are scored.
    for stops, last in [
        (("forward and backward of micro-step 1", 1), "save ends"),
        (5, "rollout begins"),
        (("scores answers by reward", 1), "scoring begins"),
    ]:
        assert runs.train(out, stops=stops, save_every=None, resume="auto") == "stopped"
        assert [line["step"] for line in log_of(out)] == list(range(1, EVERY + 1))
        events = [json.loads(line)["event"] for line in (out / "run/events.jsonl").read_text().splitlines()]
        assert events[-2:] == [last, "stopped on request"]
        assert (out / "run/checkpoints/latest").read_text() == f"global_step{EVERY}"
    assert runs.train(out, resume="auto", save_every=None) is None
    assert log_of(out) == log_of(whole)
    assert completions(out) == completions(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_adapters_the_reference_is_the_model_without_them(ranks: int, runs: Runs, tmp_path: Path) -> None:
    given = dict(save_model_path=tmp_path / "out", save_every=None, lora_rank=2)
    given |= {"deepspeed": sharded(tmp_path)} if ranks > 1 else {}
    for away, moved, held in runs.groups[ranks].run(_references, runs.base | given, timeout_s=240):
        assert held == 1
        assert away <= 1e-6
        assert moved > 1e-3


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_rollout_of_one_step_needs_no_pass_before_it(ranks: int, runs: Runs, tmp_path: Path) -> None:
    """Loss and gradients of all policies and objectives; no step moves a weight."""
    given = dict(save_model_path=tmp_path / "out", save_every=None, latent_policy="gaussian", updates=1)
    given |= dict(learning_rate=1e-30, max_drift=1e9) | ({"deepspeed": sharded(tmp_path)} if ranks > 1 else {})
    for found in runs.groups[ranks].run(_both_ways, runs.base | given, timeout_s=240):
        assert len(found) == (20 if ranks == 1 else 3)
        assert max(max(one) for one in found.values()) <= 1e-6, found


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on(before: int, after: int, runs: Runs, whole: Path, tmp_path: Path) -> None:
    """Prompts, their order and the draws are the same; sums are rounded otherwise, so later tokens may differ."""
    out = tmp_path / "out"
    if before == 2:
        shutil.copytree(whole, out)
        (out / "run/checkpoints/latest").write_text(f"global_step{EVERY}")
    else:
        assert runs.train(out, before, stops=("scores answers by reward", 2), save_every=None) == "stopped"
    assert f"`mirage-ds checkpoint convert {out}/run/checkpoints" in str(runs.train(out, after, resume="auto"))
    convert(out, say=lambda _: None)
    assert runs.train(out, after, resume="auto") is None
    lines, answers = log_of(out), completions(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [(one["rollout"], one["line"]) for one in answers] == [
        (one["rollout"], one["line"]) for one in completions(whole)
    ]
    # A step of nano is too small for a rounding to choose another token.
    for one, other in zip(answers, completions(whole), strict=True):
        assert one == other | {"advantage": pytest.approx(other["advantage"])}
    for one, other in zip(lines, log_of(whole), strict=True):
        assert {name: one[name] for name in (*MEASURED, "reward")} == pytest.approx(
            {name: other[name] for name in (*MEASURED, "reward")}, abs=NOISE, rel=NOISE
        )


@pytest.mark.parametrize(
    "settings",
    [
        dict(latent_policy="replay", objective="gspo", num_iterations=2, resample=1, mask_truncated=True),
        dict(latent_policy="gaussian", objective="dapo", truncation_penalty=0.1),
        dict(latent_policy="vlpo", objective="cispo", lora_rank=2),
        dict(latent_policy="text", objective="dr_grpo", rollout_rows=2, entropy=0.01),
    ],
    ids=lambda settings: settings["latent_policy"],
)
def test_each_policy_runs(settings: dict[str, Any], runs: Runs, tmp_path: Path) -> None:
    if settings["latent_policy"] == "gaussian":
        file = runs.base["data_path"]
        rows = [json.loads(line) | {"text_output": "\\boxed{left}"} for line in file.read_text().splitlines()]
        boxed = write_jsonl(file.with_name("boxed.jsonl"), rows)
        settings = settings | dict(eval_data_path=boxed, eval_every=STEPS, eval_decode=4, eval_new_tokens=8)
    assert runs.train(tmp_path / "out", save_every=None, **settings) is None
    *lines, last = lines_of(tmp_path / "out")
    # By the mean of the latents, and by latents that are drawn.
    assert {"eval_correct", "eval_correct_drawn"} <= last.keys() or settings["latent_policy"] != "gaussian"
    assert all(line["decoder_drift_max"] <= 1e-5 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    # Of steps whose answers have blocks.
    assert any("latent_ratio" in line for line in lines) == (settings["latent_policy"] in ("gaussian", "vlpo"))
    assert settings["latent_policy"] != "text" or lines[0]["latent_share"] == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reward": ["rewards_of_rl:missing"]}, "rewards_of_rl has no function missing"),
        ({"reward": ["nowhere:varied"]}, "nowhere"),
        (
            {"reward": ["accuracy"], "task": "vsp-spatial-planning"},
            "jsonl:1: the record has no 'map_desc', which vsp-spatial-planning is scored by",
        ),
        ({"max_drift": 1e-12}, "rollout 1: log-probabilities of decoder and training differ by"),
        ({"min_latent_share": 1.0}, "rollout 1: "),
        ({"latent_size": 3}, "--latent_size 3: "),
        # The records have no answer.
        ({"reward": ["accuracy"], "data_path": "bare"}, "bare.jsonl: text_output: missing in 12 of 12 records"),
    ],
)
def test_bad_input_is_one_sentence(settings: dict[str, Any], sentence: str, runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if "data_path" in settings:
        rows = [json.loads(line) for line in runs.base["data_path"].read_text().splitlines()]
        bare = [{key: value for key, value in row.items() if key != "text_output"} for row in rows]
        settings = settings | dict(data_path=write_jsonl(runs.base["data_path"].with_name("bare.jsonl"), bare))
    said = runs.train(out, **settings)
    assert said
    assert sentence in said
    assert "\n" not in said
    assert "rollout 1" in said or not files(out)


def test_memory_that_does_not_hold_a_rollout_is_one_sentence(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one, other = runs.groups[2].run(_without_room, runs.base | dict(save_model_path=out), timeout_s=240)
    assert one == other
    assert str(one).startswith("a rollout of 6 answers at a time: to decode, each rank needs the whole model, its keys")
    assert "lower --rollout_rows or --max_completion_length, or use GPUs with more memory" in str(one)
    # Nothing was sampled.
    assert not (out / "run/completions.jsonl").exists()


def test_a_model_without_latents_learns_text(runs: Runs, nano: Path, tmp_path: Path) -> None:
    assert runs.train(tmp_path / "out", model=str(nano), save_every=None, max_steps=EVERY) is None
    assert {line["latent_share"] for line in lines_of(tmp_path / "out")} == {0.0}
    assert json.loads((tmp_path / "out/config.json").read_text())["mirage"]["stage"] == "sft"
    said = runs.train(tmp_path / "other", model=str(nano), latent_policy="through")
    assert said
    assert said.startswith(f"--latent_policy through: {nano} was trained without latents")
