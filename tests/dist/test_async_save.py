"""--async_save on two ranks: what is on the disk while it writes and after it, whatever comes in between."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.group import Group, GroupFailure
from support.on_disk import log_of
from test_reliability import asked_after, equal, zero
from test_resume import BASE, STEPS, assert_equal

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.engine.private import Collecting, host_copy
from mirage_ds.errors import Stopped, UserError
from mirage_ds.run.settings import Run

# ------------------------------------------------------------------------------------------------------- on the ranks

# (a rank's copies, step that was saved): what happens to the rank while it writes them.
Trouble = Callable[[Any, int], AbstractContextManager[None]]


@contextmanager
def no_room(copies: Any, step: int) -> Iterator[None]:
    """Have no room for the shard of step 4."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if step == 4 else hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def killed(copies: Any, step: int) -> Iterator[None]:
    """Be killed with half of a file of step 4 on the disk."""
    if step == 4:
        Path(copies[0][1]).write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    yield


def _train(
    world: Any,
    settings: dict[str, Any],
    patience_s: float = 20,
    trouble: tuple[int, Trouble] | None = None,
    stop: int | None = None,
    odd: int | None = None,
) -> tuple[str, list[int]]:
    """Train; a copy is written once two more steps are taken, or patience is at an end.

    Args:
        trouble: rank → what happens to it then.
        stop: the look at which rank 1 is asked to stop. odd: a step that is skipped.

    Returns:
        How it ended, and how many steps were taken between each copy and its first byte.
    """
    asked = asked_after(stop if world.rank == 1 else None)
    run = Run(RunConfig(**settings), world, asked=asked)
    data, learner = train.open_run(run)
    write, step, later = Collecting.write, train.step, []

    def slow(files: Collecting) -> None:
        if copies := files._copies:
            saved, end = (
                int(Path(copies[0][1]).parent.name.split("step")[1].split(".")[0]),
                time.monotonic() + patience_s,
            )
            while learner.engine.global_steps < saved + 2 and time.monotonic() < end:
                time.sleep(0.001)
            later.append(learner.engine.global_steps - saved)
            if trouble and trouble[0] == world.rank:
                with trouble[1](copies, saved):
                    return write(files)
        return write(files)

    def odd_step(*words: Any) -> Any:
        taken = step(*words)
        return taken._replace(applied=words[3].step + 1 != odd)

    Collecting.write, train.step = slow, odd_step  # type: ignore[method-assign]
    try:
        train.train(run, data, learner)
    except (Stopped, UserError) as error:
        return f"{type(error).__name__}: {error}", later
    finally:
        Collecting.write, train.step = write, step  # type: ignore[method-assign]
        learner.engine.destroy()
    return "", later


# ---------------------------------------------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def base(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = tmp_path_factory.mktemp("cache")
    return BASE | dict(model=str(nano), data_path=mixed, cache_dir=cache, resume="auto", async_save=True)


@pytest.fixture(scope="module")
def whole(group: Group, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of a ZeRO stage without --async_save; once for each."""
    made: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("whole") / "run"
            settings = base | dict(save_model_path=made[stage], async_save=False)
            settings["deepspeed"] = zero(made[stage].parent, stage)
            assert group.run(_train, settings) == [("", [])] * 2
        return made[stage]

    return run


def events_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "run/events.jsonl").read_text().splitlines()]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "run/checkpoints").iterdir() if path.is_dir())


@pytest.mark.parametrize("stage", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2))])
def test_what_is_written_beside_steps_is_what_was_there_before_them(
    stage: int, group: Group, base: dict[str, Any], whole: Callable[[int], Path], tmp_path: Path
) -> None:
    out, json_of_stage = tmp_path / "out", zero(tmp_path, stage)
    settings = base | dict(save_model_path=out, deepspeed=json_of_stage)
    # Under ZeRO-0 rank 0 writes all. The last save is not made beside steps: none comes after it.
    assert group.run(_train, settings) == [("", [2, 2]), ("", [2, 2] if stage else [])]
    equal(out, whole(stage))
    for step in (2, 4, 6):
        one, other = (folder / f"run/checkpoints/global_step{step}" for folder in (out, whole(stage)))
        assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
        for file in one.glob("*.pt"):
            assert_equal(*(torch.load(folder / file.name, weights_only=False) for folder in (one, other)))
    ends = [one for one in events_of(out) if one["event"] == "save ends"]
    for end in ends:
        files = (out / f"run/checkpoints/global_step{end['step']}").iterdir()
        assert end["bytes"] == sum(file.stat().st_size for file in files if file.suffix == ".pt")
        assert end["held_seconds"] <= end["seconds"]
    # From the first of them on.
    for left in ("global_step4", "global_step6"):
        shutil.rmtree(out / "run/checkpoints" / left)
    (out / "run/checkpoints/latest").write_text("global_step2")
    assert group.run(_train, settings | dict(async_save=False)) == [("", [])] * 2
    equal(out, whole(stage))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_meanwhile_is_said_and_training_goes_on(
    rank: int, group: Group, base: dict[str, Any], whole: Callable[[int], Path], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    settings = base | dict(save_model_path=out, log_file=log, deepspeed=zero(tmp_path, 3))
    assert group.run(_train, settings, trouble=(rank, no_room)) == [("", [2, 2])] * 2
    equal(out, whole(3))
    folder = out / "run/checkpoints"
    assert names(out) == ["global_step2", "global_step6"]
    said = [line for line in log.read_text().splitlines() if "error: no checkpoint" in line]
    assert len(said) == 1
    assert f"error: no checkpoint of step 4: {folder}/.global_step4.partial/" in said[0]
    assert said[0].endswith(f"; the last good one is {folder}/global_step2")


@pytest.mark.parametrize(
    ("how", "wanted", "checkpoints"),
    [
        # Looks: three of the start, one a step.
        (dict(stop=6), "Stopped: ", [2, 3]),
        (dict(stop=5), "Stopped: ", [2]),
        (dict(odd=3), "UserError: 1 optimizer steps in a row, the last of them step 3,", [2]),
    ],
)
def test_what_ends_a_run_waits_for_the_checkpoint_that_is_written(
    how: dict[str, int],
    wanted: str,
    checkpoints: list[int],
    group: Group,
    base: dict[str, Any],
    whole: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    # Looks are counted from the first step on: the features are made.
    whole(3)
    out = tmp_path / "out"
    settings = base | dict(save_model_path=out, max_skipped_steps=1, deepspeed=zero(tmp_path, 3))
    for told, _ in group.run(_train, settings, patience_s=0.5, **how):
        assert told.startswith(wanted)
        assert "odd" not in how or f"the last good checkpoint is {out}/run/checkpoints/global_step2" in told
    assert names(out) == [f"global_step{step}" for step in checkpoints]
    assert (out / "run/checkpoints/latest").read_text() == f"global_step{checkpoints[-1]}"
    assert group.run(_train, settings)[0][0] == ""
    equal(out, whole(3))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    rank: int, group: Group, base: dict[str, Any], whole: Callable[[int], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = base | dict(save_model_path=out, deepspeed=zero(tmp_path, 3))
    with pytest.raises(GroupFailure):
        group.run(_train, settings, trouble=(rank, killed))
    # It was between two steps of the training, which knew nothing of it.
    assert [line["step"] for line in log_of(out)][:4] == [1, 2, 3, 4]
    assert names(out) == [".global_step4.partial", "global_step2"]
    assert (out / "run/checkpoints/latest").read_text() == "global_step2"
    assert group.run(_train, settings)[0][0] == ""
    equal(out, whole(3))
    assert names(out) == [f"global_step{step}" for step in (2, 4, STEPS)]


def test_a_copy_shares_what_the_original_shares_and_nothing_with_it() -> None:
    flat = torch.arange(12.0)
    made = host_copy({"views": [flat[2:5], flat.view(3, 4)[:, 1]], "shape": torch.Size([3]), "none": torch.empty(0)})
    one, other = made["views"]
    flat.zero_()
    assert (one.tolist(), other.tolist(), made["shape"].numel()) == ([2, 3, 4], [1, 5, 9], 3)
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
