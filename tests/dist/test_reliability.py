"""Nothing lost, on two ranks: damaged and unfinished checkpoints, full disks, requests to stop, numbers going wrong."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.group import Group
from support.on_disk import files, log_of, rewrite
from test_resume import BASE, STEPS

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.engine.checkpoint import CheckpointWriter, newest_whole
from mirage_ds.engine.manifest import MANIFEST, candidates
from mirage_ds.errors import Stopped, UserError
from mirage_ds.run.settings import Run

# ------------------------------------------------------------------------------------------------------- on the ranks


def asked_after(calls: int | None) -> Callable[[], bool]:
    """Be asked to stop from the `calls`-th look on."""
    if calls is None:
        return lambda: False
    left = iter(range(calls - 1))
    return lambda: next(left, None) is None


def _train(world: Any, settings: dict[str, Any], stops: dict[int, int] | None = None) -> tuple[str, list[str]]:
    """Train; how it ended, and which checkpoints were passed over. `stops`: rank → look at which it is asked."""
    config = RunConfig(**settings)
    asked = asked_after((stops or {}).get(world.rank))
    passed: list[str] = []
    learner = None
    try:
        run = Run(config, world, asked=asked)
        data, learner = train.open_run(run)
        passed = learner.checkpoint.passed_over if learner.checkpoint else []
        train.train(run, data, learner)
    except (UserError, Stopped) as error:
        return f"{type(error).__name__}: {error}", passed
    finally:
        if learner:
            learner.engine.destroy()
    return "", passed


def _full_disk(world: Any, settings: dict[str, Any], rank: int) -> list[Any]:
    """Save; save with no room for one rank's shard; save again. What each came to, and what lay there then."""
    config = RunConfig(**settings)
    _, learner = train.open_run(Run(config, world))
    folder, found = config.save_model_path / "run/checkpoints", []
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, limited in ((1, False), (2, True), (3, False)):
        if limited and world.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        outcome = CheckpointWriter(learner.engine, folder, {**learner.state, "step": step}, world).finish(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        # DeepSpeed also leaves scripts there.
        names = sorted(path.name for path in folder.iterdir() if path.suffix != ".py")
        found.append(
            (outcome if isinstance(outcome, str) else str(outcome.place), names, (folder / "latest").read_text())
        )
    learner.engine.destroy()
    return found


def _poison(world: Any, settings: dict[str, Any], bad_rows: list[int], what: str) -> dict[str, Any]:
    """Train while the loss (or the gradient alone) of some rows is not finite; weights before and after."""
    import deepspeed

    config = RunConfig(**settings)
    run = Run(config, world)
    data, learner = train.open_run(run)
    model = learner.engine.module
    current: list[Any] = []
    model.register_forward_pre_hook(lambda module, inputs: current.append(inputs[0]))

    def spoil(module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        total, losses = output
        batch = current[-1]
        hit = torch.isin(batch.rows, torch.tensor(bad_rows))[batch.target_sample]
        if what == "gradient" and hit.any():
            total.register_hook(lambda gradient: gradient * torch.inf)
        if what == "loss" and hit.any():
            # Infinite with a finite gradient: nobody would notice it by the gradient's norm.
            return total + torch.inf, losses + torch.where(hit, torch.inf, 0.0)
        return output

    model.head.register_forward_hook(spoil)
    named = list(model.named_parameters())

    def weights() -> dict[str, torch.Tensor]:
        with deepspeed.zero.GatheredParameters([p for _, p in named if hasattr(p, "ds_id")]):
            return {name: p.detach().clone() for name, p in named}

    found: dict[str, Any] = {"weights": [weights()], "told": ""}
    take = learner.engine.step
    learner.engine.step = lambda: (take(), found["weights"].append(weights()))[0]
    try:
        train.train(run, data, learner)
    except UserError as error:
        found["told"] = str(error)
    found["end"] = weights()
    learner.engine.destroy()
    return found


# ---------------------------------------------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def base(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return BASE | dict(model=str(nano), data_path=mixed, cache_dir=tmp_path_factory.mktemp("cache"), resume="auto")


@pytest.fixture(scope="module")
def whole(group: Group, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run; checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert group.run(_train, base | dict(save_model_path=out)) == [("", [])] * 2
    return out


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The run as if it had ended after step 4, with the checkpoints of steps 2 and 4."""
    out = tmp_path / "stopped"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("global_step6", "*.safetensors", "config.json"))
    (out / "run/checkpoints/latest").write_text("global_step4")
    return out


def equal(out: Path, whole: Path) -> None:
    assert log_of(out) == log_of(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------------------- checkpoints


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*rank_1*optim_states.pt"))


def cut(checkpoint: Path) -> str:
    file = shard(checkpoint)
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    return f"{file.name} has {len(content) - 7} bytes, {len(content)} were written"


def flip(checkpoint: Path) -> str:
    file = shard(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    return f"{file.name} differs from what was written (SHA-256)"


def delete(checkpoint: Path) -> str:
    file = shard(checkpoint)
    file.unlink()
    return f"{file.name}: No such file or directory"


def unlist(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).unlink()
    return f"{MANIFEST} is missing or broken: its writer did not finish"


def garble(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).write_bytes(b"\xff{")
    return f"{MANIFEST} is missing or broken: its writer did not finish"


@pytest.mark.parametrize("harm", [cut, flip, delete, unlist, garble])
def test_a_damaged_checkpoint_is_named_and_the_one_before_found(harm: Callable[[Path], str], stopped: Path) -> None:
    newest = stopped / "run/checkpoints/global_step4"
    said = harm(newest)
    found = newest_whole(newest.parent)
    assert found is not None
    assert found.place == newest.with_name("global_step2")
    assert len(found.passed_over) == 1
    assert found.passed_over[0].startswith(f"{newest} is damaged: {said}")


# Of a file that one of the ranks reads, and of the manifest that both do.
@pytest.mark.parametrize("harm", [flip, unlist])
def test_ranks_name_a_damaged_checkpoint_alike_and_use_the_one_before(
    harm: Callable[[Path], str], group: Group, base: dict[str, Any], whole: Path, stopped: Path
) -> None:
    newest = stopped / "run/checkpoints/global_step4"
    said = harm(newest)
    (told, passed), other = group.run(_train, base | dict(save_model_path=stopped))
    assert told == ""
    assert len(passed) == 1
    assert passed[0].startswith(f"{newest} is damaged: {said}")
    assert other == (told, passed)
    equal(stopped, whole)


LATEST = (None, b"", b"\xff\xfe", b"global_step9", b"../elsewhere")


def write_latest(checkpoints: Path, content: bytes | None) -> Path:
    latest = checkpoints / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    return latest


@pytest.mark.parametrize("content", LATEST)
def test_a_lost_or_wrong_latest_hides_no_checkpoint(content: bytes | None, stopped: Path) -> None:
    latest = write_latest(stopped / "run/checkpoints", content)
    assert [place.name for place in candidates(latest.parent)] == ["global_step4", "global_step2"]


@pytest.mark.parametrize("content", [LATEST[0], LATEST[-1]])
def test_a_lost_or_wrong_latest_is_no_loss(
    content: bytes | None, group: Group, base: dict[str, Any], whole: Path, stopped: Path
) -> None:
    latest = write_latest(stopped / "run/checkpoints", content)
    # What a killed writer leaves is no checkpoint, and is cleared away.
    unfinished = latest.with_name(".global_step6.partial")
    shutil.copytree(latest.with_name("global_step4"), unfinished)
    assert group.run(_train, base | dict(save_model_path=stopped)) == [("", [])] * 2
    equal(stopped, whole)
    assert not unfinished.exists()


def test_where_none_is_whole_nothing_is_touched(group: Group, base: dict[str, Any], stopped: Path) -> None:
    folder = stopped / "run/checkpoints"
    said = [f"{folder / name} is damaged: {harm(folder / name)}" for name, harm in
            (("global_step4", cut), ("global_step2", unlist))]  # fmt: skip
    before = files(stopped)
    told, _ = group.run(_train, base | dict(save_model_path=stopped))
    assert told[0].startswith(f"UserError: no checkpoint in {folder} is whole ({'; '.join(said)});")
    assert files(stopped) == before


def test_a_state_that_does_not_match_its_manifest_is_damage(group: Group, base: dict[str, Any], stopped: Path) -> None:
    state = stopped / "run/checkpoints/global_step4/mirage_state.json"
    state.write_text(state.read_text().replace('"seed": 42', '"seed": 43'))
    (_, passed), _ = group.run(_train, base | dict(save_model_path=stopped))
    assert "mirage_state.json differs from what was written" in passed[0]
    # With its manifest it is another run's.
    state = stopped / "run/checkpoints/global_step6/mirage_state.json"
    rewrite(state, {"seed": 43})
    (told, _), _ = group.run(_train, base | dict(save_model_path=stopped))
    assert told.startswith(f"UserError: --resume auto: {state.parent} was written with --seed 43, this run has 42")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_leaves_the_earlier_checkpoints(
    rank: int, group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, other = group.run(_full_disk, base | dict(save_model_path=out), rank)
    assert [one[0] for one in first] == [one[0] for one in other]
    folder = out / "run/checkpoints"
    assert first[0] == (str(folder / "global_step1"), ["global_step1", "latest"], "global_step1")
    told, names, latest = first[1]
    assert told.startswith(f"{folder}/.global_step2.partial/")
    assert (names, latest) == (["global_step1", "latest"], "global_step1")
    assert first[2] == (str(folder / "global_step3"), ["global_step1", "global_step3", "latest"], "global_step3")


def test_a_folder_that_cannot_be_written_is_said_and_training_goes_on(
    group: Group, base: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    (out / "run").mkdir(parents=True)
    (out / "run/checkpoints").write_text("in the way")
    # By this the folder is known as a run's.
    (out / "run/events.jsonl").touch()
    assert group.run(_train, base | dict(save_model_path=out, log_file=log)) == [("", [])] * 2
    equal(out, whole)
    said = log.read_text()
    for step in (2, 4, 6):
        sentence = f"error: no checkpoint of step {step}: {out}/run/checkpoints: File exists; the last good one is none"
        assert said.count(sentence) == 1


# ----------------------------------------------------------------------------------------------------------- stopping


# Looks: one before the first step, one a step, one a micro-batch of an evaluation (3 of 5 rows on two ranks).
@pytest.mark.parametrize(
    ("rank", "look", "step"),
    [
        # The first two looks are of the start.
        (1, 3, 0),
        pytest.param(1, 4, 1, marks=pytest.mark.slow),
        (0, 6, 3),
        pytest.param(1, 9, 6, marks=pytest.mark.slow),
    ],
)
def test_one_rank_is_asked_and_all_save_and_stop(
    rank: int, look: int, step: int, group: Group, base: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    told = group.run(_train, base | dict(save_model_path=out), {rank: look})
    assert told == [("Stopped: ", [])] * 2
    checkpoints = out / "run/checkpoints"
    assert not (out / "config.json").exists()
    assert [line["step"] for line in log_of(out)] == list(range(1, step + 1))
    if step:
        assert (checkpoints / "latest").read_text() == f"global_step{step}"
    assert group.run(_train, base | dict(save_model_path=out)) == [("", [])] * 2
    equal(out, whole)


@pytest.mark.parametrize(("look", "begun"), [(1, False), (2, True)])
def test_a_start_is_left_before_its_first_step(
    look: int, begun: bool, group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert group.run(_train, base | dict(save_model_path=out), {1: look}) == [("Stopped: ", [])] * 2
    assert (out / "run/events.jsonl").exists() == begun
    assert not (out / "run/checkpoints/latest").exists()


def test_an_evaluation_is_left_on_request(
    group: Group, base: dict[str, Any], whole: Path, mixed: Path, tmp_path: Path
) -> None:
    data, out = mixed.parent / "held_out_to_stop.jsonl", tmp_path / "out"
    data.write_text("".join(mixed.read_text().splitlines(keepends=True)[3:8]))
    settings = base | dict(save_model_path=out, eval_data_path=data, eval_every=3)
    # Looks 4, 5, 6 are of the steps, the seventh of the evaluation's first micro-batch.
    assert group.run(_train, settings, {1: 7}) == [("Stopped: ", [])] * 2
    assert log_of(out, evaluations=True) == []
    assert (out / "run/checkpoints/latest").read_text() == "global_step3"
    assert group.run(_train, settings) == [("", [])] * 2
    equal(out, whole)
    # The one that was left is made up for.
    assert [line["step"] for line in log_of(out, evaluations=True)] == [3, 6]


def test_a_model_that_cannot_be_written_is_said_and_written_later(
    group: Group, base: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # A folder stands where the weights are to go first.
    (out / ".model-00000.safetensors.partial").mkdir(parents=True)
    told = group.run(_train, base | dict(save_model_path=out))
    assert told[0][0].startswith("UserError: the model cannot be written (")
    assert told[0][0].endswith(f"the last good checkpoint is {out}/run/checkpoints/global_step{STEPS}")
    assert not (out / "config.json").exists()
    (out / ".model-00000.safetensors.partial").rmdir()
    assert group.run(_train, base | dict(save_model_path=out)) == [("", [])] * 2
    equal(out, whole)


# ---------------------------------------------------------------------------------------------- numbers going wrong


def zero(tmp_path: Path, stage: int) -> Path:
    path = tmp_path / f"zero{stage}.json"
    block = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    path.write_text(json.dumps({"zero_optimization": block}))
    return path


Poisoned = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def poisoned(group: Group, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    """Run `_poison` for three steps: poisoned(ZeRO stage, folder, bad rows, what)."""
    settings = base | dict(stage="sft", save_every=None, max_steps=3, warmup_steps=0, log_rows=True)

    def run(stage: int, out: Path, bad_rows: list[int], what: str) -> list[dict[str, Any]]:
        json_of_stage = zero(tmp_path_factory.mktemp("zero"), stage)
        return group.run(_poison, settings | dict(save_model_path=out, deepspeed=json_of_stage), bad_rows, what)

    return run


@pytest.fixture(scope="module")
def clean_run(poisoned: Poisoned, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[dict, Path]]:
    """What a ZeRO stage does with finite numbers on the first rank, and its folder; once for each."""
    made: dict[int, tuple[dict[str, Any], Path]] = {}

    def run(stage: int) -> tuple[dict[str, Any], Path]:
        if stage not in made:
            out = tmp_path_factory.mktemp("clean") / "run"
            made[stage] = poisoned(stage, out, [], "nothing")[0], out
        return made[stage]

    return run


@pytest.mark.parametrize("stage", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    stage: int, what: str, poisoned: Poisoned, clean_run: Callable[[int], tuple[dict, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    clean, clean_out = clean_run(stage)
    rows = [line["row_ids"] for line in log_of(clean_out)]
    bad = sorted(rows[1])[:1]
    found, other = poisoned(stage, out, bad, what)
    assert found["told"] == other["told"] == ""
    lines = log_of(out)
    assert [line["skipped"] for line in lines] == [0, 1, 0]
    assert (lines[1]["loss"] is None) == (what == "loss")
    assert lines[1]["grad_norm"] is None
    # The schedule has not moved either.
    assert lines[2]["lr"] == lines[1]["lr"] != lines[0]["lr"]
    (note,) = [json.loads(line) for line in (out / "run/odd_steps.jsonl").read_text().splitlines()]
    named = bad if what == "loss" else rows[1]
    assert note["step"] == 2
    assert note["why"] == f"the {what} was not finite, the step is skipped"
    assert sorted(one["row"] for one in note["rows"]) == sorted(named)
    assert all(one["line"] == one["row"] + 1 for one in note["rows"])
    # Step 1 is the clean run's; step 3 starts from its weights and moves them.
    for name, tensor in found["end"].items():
        assert torch.equal(tensor, other["end"][name])
        assert torch.equal(found["weights"][1][name], clean["weights"][1][name])
        assert bool(tensor.isfinite().all())
    assert any(not torch.equal(found["weights"][1][name], tensor) for name, tensor in found["end"].items())
    if stage:  # ZeRO-0 in fp32 never calls the optimizer
        assert all(torch.equal(found["weights"][2][name], found["weights"][1][name]) for name in found["end"])


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(
    group: Group, base: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = base | dict(save_model_path=out, max_skipped_steps=2, save_every=1, log_rows=True, stage="sft")
    group.run(_poison, settings | dict(save_model_path=tmp_path / "clean", max_steps=1), [], "nothing")
    first = log_of(tmp_path / "clean")[0]["row_ids"]
    found, other = group.run(_poison, settings, [row for row in range(12) if row not in first], "loss")
    assert found["told"] == other["told"]
    assert found["told"].startswith("2 optimizer steps in a row, the last of them step 3, had a loss or gradient")
    assert f"the last good checkpoint is {out}/run/checkpoints/global_step2;" in found["told"]
    assert len(log_of(out)) == 3 < STEPS
