"""`mirage-ds status` on folders as runs leave them in every state, whole lines or half ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mirage_ds.cluster.status.command import status
from mirage_ds.cluster.status.facts import Facts, find_run
from mirage_ds.cluster.status.show import duration, short_names
from mirage_ds.cluster.status.summary import State, judge, summary
from mirage_ds.engine.manifest import entry_of, write_manifest
from mirage_ds.errors import UserError
from mirage_ds.run import events

NOW = 1_800_000_000.0
SECONDS = 2.0


class Run:
    """A run folder, written by hand: `at` says seconds before NOW."""

    def __init__(self, folder: Path):
        self.folder, self.own = folder, folder / "run"
        self.own.mkdir(parents=True)
        settings = {"stage": "stage1", "model": "m", "data_path": "d.jsonl", "max_length": 4096}
        (self.own / "config.yaml").write_text(yaml.safe_dump(settings))

    def add(self, name: str, line: dict[str, Any]) -> Run:
        with (self.own / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return self

    def event(self, at: float, name: str, step: int | None = None, why: str | None = None) -> Run:
        line = {"time": NOW - at, "event": name, "step": step, "why": why}
        return self.add(events.FILE, {key: value for key, value in line.items() if value is not None})

    def started(self, at: float, step: int = 0, steps: int = 100) -> Run:
        facts = {"steps": steps, "start": step, "world_size": 8, "device": "NVIDIA A40", "dropped": 3}
        (self.own / "run.json").write_text(json.dumps(facts))
        return self.event(at, events.LOAD_BEGINS).event(at - 1, events.LOAD_ENDS, step)

    def step(self, at: float, step: int, **values: Any) -> Run:
        line = {
            "step": step,
            "time": NOW - at,
            "loss": 1 / step,
            "lr": 1e-4,
            "labels": 40,
            "skipped": 0,
            "rows": 8,
            "seconds": SECONDS,
            "samples_per_second": 4.0,
            "tokens_per_second": 2000.0,
            "memory_gb": 30.0,
        }
        return self.add("log.jsonl", line | values)

    def checkpoint(self, at: float, step: int, whole: bool = True) -> Run:
        place = self.own / f"checkpoints/global_step{step}"
        place.mkdir(parents=True)
        (place / "shard.pt").write_text("weights")
        write_manifest(place, [entry_of(place, place / "shard.pt")])
        if not whole:
            (place / "shard.pt").write_text("weig")
        (place.parent / "latest").write_text(place.name)
        return self.event(at, events.SAVE_BEGINS, step).event(at - 1, events.SAVE_ENDS, step)

    def state(self, now: float = NOW) -> State:
        return judge(Facts(self.folder), now)

    def summary(self, now: float = NOW) -> dict[str, Any]:
        return summary(Facts(self.folder), now)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "one")


@pytest.fixture
def training(run: Run) -> Run:
    """Twenty steps of two seconds, three from step to step, the last one three seconds ago."""
    run.started(100)
    for step in range(1, 21):
        run.step(3 * (21 - step), step)
    return run


# ------------------------------------------------------------------------------------------------------------- states


def test_a_start_names_its_phase(run: Run) -> None:
    os.utime(run.own / "config.yaml", (NOW - 50, NOW - 50))
    assert run.state() == State("starting", "", NOW - 50)
    run.event(40, events.LOAD_BEGINS).event(40, f"{events.PHASE}model").event(20, f"{events.PHASE}engine")
    assert run.state() == State("starting", "engine", NOW - 20)
    run.event(10, events.LOAD_ENDS, 0)
    assert run.state() == State("starting", "first step", NOW - 10)
    run.step(5, 1)
    assert run.state() == State("training", "", NOW - 5)


def test_a_resumed_run_starts_again_though_its_log_has_steps(training: Run) -> None:
    training.event(2, events.LOAD_BEGINS).event(2, f"{events.PHASE}load")
    assert training.state()[:2] == ("starting", "load")
    training.event(1, events.LOAD_ENDS, 20)
    assert training.state()[:2] == ("starting", "first step")
    assert training.step(0.5, 21).state().name == "training"


@pytest.mark.parametrize(
    ("begin", "end", "name", "detail", "then"),
    [
        (events.SAVE_BEGINS, events.SAVE_ENDS, "saving", "a checkpoint", "training"),
        (events.EVALUATION_BEGINS, events.EVALUATION_ENDS, "evaluating", "", "training"),
        (events.ROLLOUT_BEGINS, events.SCORING_BEGINS, "sampling", "answers", "sampling"),
        (events.SCORING_BEGINS, events.ROLLOUT_ENDS, "sampling", "rewards", "training"),
    ],
)
def test_saves_rollouts_and_evaluations_are_seen_and_may_take_their_time(
    training: Run, begin: str, end: str, name: str, detail: str, then: str
) -> None:
    training.event(2, begin, 20)
    # Nobody knows yet how long one takes.
    assert training.state().name == training.state(NOW + 3000).name == name
    assert training.event(1, end, 20).state().name == then
    # Now it does: a second. Ten times that is less than the least that is waited for.
    training.event(0, begin, 20)
    assert training.state(NOW + 59).name == name
    assert training.state(NOW + 61) == State("silent", f"it was {name}{f' ({detail})' if detail else ''}", NOW)


def test_silence_is_measured_in_usual_steps(training: Run) -> None:
    # Also while a checkpoint is written beside them.
    training.event(4, events.SAVE_BEGINS, 20).event(4, events.SAVE_GOES_ON, 20)
    assert training.state(NOW + 56).name == "training"
    silent = training.summary(NOW + 717)
    assert (silent["state"], silent["detail"], silent["silent_seconds"]) == ("silent", "it was training", 720)
    assert silent["eta_seconds"] is None
    for step in range(21, 80):
        training.step(0, step, seconds=100)
    assert training.state(NOW + 999).name == "training"
    assert training.state(NOW + 1001).name == "silent"


def test_a_log_without_times_goes_by_the_files_date(run: Run) -> None:
    run.started(500)
    for step in range(1, 4):
        run.step(0, step)
    log = run.own / "log.jsonl"
    lines = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(log, (NOW - 5, NOW - 5))
    assert run.state() == State("training", "", NOW - 5)
    assert run.summary()["eta_seconds"] == 97 * SECONDS


@pytest.mark.parametrize(
    ("event", "why", "name", "detail"),
    [
        (events.MODEL_ENDS, None, "finished", ""),
        (events.STOPPED, None, "stopped", "on request"),
        (events.FAILED, "no room on the disk", "failed", "no room on the disk"),
    ],
)
def test_ends_stay_however_long_ago(training: Run, event: str, why: str | None, name: str, detail: str) -> None:
    training.event(1, event, 20, why)
    assert training.state(NOW + 1e7) == State(name, detail, NOW - 1)
    # And are over once the run goes on.
    assert training.event(0.5, events.LOAD_BEGINS).state().name == "starting"


def test_a_guards_verdict_says_why(training: Run) -> None:
    verdict = {"job": "j", "code": 69, "why": ["rank 0 waits", "rank 3 on b: no sign of life for 30 s"]}
    training.add("faults.jsonl", {**verdict, "time": NOW - 1000})
    assert training.state().name == "training"
    training.event(1, events.FAILED, why="RuntimeError: Connection closed by peer")
    training.add("faults.jsonl", {**verdict, "time": NOW})
    assert training.state()[:2] == ("failed", "rank 3 on b: no sign of life for 30 s (exit code 69)")
    assert training.summary()["faults"]["guards' verdicts"]["count"] == 2


def test_a_guards_stop_is_none_of_the_faults(training: Run) -> None:
    training.add("faults.jsonl", {"time": NOW, "job": "j", "code": 75, "why": ["stopped on request"]})
    assert training.state().name == "stopped"
    assert "guards' verdicts" not in training.summary()["faults"]


# ------------------------------------------------------------------------------------------------------------ numbers


def test_numbers_of_a_run(training: Run) -> None:
    training.checkpoint(50, 8).checkpoint(40, 12)
    training.step(0, 20, skipped=1, loss=None, mfu=0.4, data_seconds=0.5)
    training.add("log.jsonl", {"step": 12, "time": NOW - 30, "eval_loss": 0.5})
    training.add("log.jsonl", {"step": 20, "time": NOW, "eval_loss": 0.75})
    training.add("odd_steps.jsonl", {"step": 20, "rows": [{"row": 4, "file": "d.jsonl", "line": 5}]})
    found = training.summary()
    assert (found["stage"], found["model"], found["world_size"]) == ("stage1", "m", 8)
    assert (found["step"], found["steps"], found["share"]) == (20, 100, 0.2)
    # Twenty lines, of which the last stands there twice; 60 s from the first to the last.
    assert found["eta_seconds"] == pytest.approx(80 * 60 / 19)
    assert found["ends_at"] == NOW + found["eta_seconds"]
    assert found["loss"] is None
    assert found["loss_mean"] == pytest.approx(sum(1 / step for step in range(1, 20)) / 19)
    assert (found["rows_per_second"], found["tokens_per_second"], found["labels_per_second"]) == (4, 2000, 20)
    assert (found["mfu"], found["data_share"], found["memory_gb"]) == (0.4, 0.25, 30)
    assert found["checkpoint"] == {"step": 12, "time": NOW - 39, "age_seconds": 39, "steps_since": 8}
    assert found["evaluation"] == {"step": 20, "loss": 0.75}
    assert found["best"] == {"metric": "loss", "value": 0.5, "step": 12}
    assert found["faults"] == {
        "skipped steps": {"count": 1, "newest": "step 20 (records on line(s) 5)"},
        "dropped rows": {"count": 3, "newest": "longer than 4096 tokens"},
    }


def test_several_sources_are_named_together(training: Run) -> None:
    assert training.summary()["data"] == "d.jsonl"
    settings = {"stage": "stage1", "data_path": ["a.jsonl:2", "b.jsonl:1"]}
    (training.own / "config.yaml").write_text(yaml.safe_dump(settings))
    assert training.summary()["data"] == "a.jsonl:2 + b.jsonl:1"


def test_the_last_fifty_steps_count(run: Run) -> None:
    run.started(1000)
    for step in range(1, 101):
        run.step(0, step, loss=float(step), tokens_per_second=float(step))
    found = run.summary()
    assert found["loss_mean"] == found["tokens_per_second"] == 75.5


def test_a_damaged_checkpoint_saves_no_step(training: Run) -> None:
    training.checkpoint(50, 8).checkpoint(40, 12, whole=False)
    assert training.summary()["checkpoint"]["step"] == 8
    assert training.summary()["checkpoint"]["steps_since"] == 12
    assert training.summary()["damaged_checkpoints"] == ["global_step12"]


def test_restarts_and_failures_are_counted(training: Run) -> None:
    for step in (4, 8):
        training.event(50, events.FAILED, why="ValueError: x").started(40, step)
    training.event(2, events.SAVE_FAILED, 20, "No space left on device")
    faults = training.summary()["faults"]
    assert faults["restarts"]["count"] == 2
    assert faults["restarts"]["newest"].endswith("went on from step 8")
    assert faults["failures"]["count"] == 2
    assert faults["failed saves"]["newest"].endswith(": No space left on device")


def test_half_lines_are_passed_over(training: Run) -> None:
    before = training.summary()
    for name in ("log.jsonl", events.FILE, "faults.jsonl"):
        with (training.own / name).open("a") as file:
            file.write('{"step": 21, "time": 1')
    assert training.summary() == before
    # A killed process left half a line, the next one began behind it.
    with (training.own / events.FILE).open("a") as file:
        file.write("\n")
    assert training.event(0, events.STOPPED, 20).state().name == "stopped"


# ------------------------------------------------------------------------------------------------------------ command


def said(*arguments: object) -> tuple[int, str]:
    got = CliRunner().invoke(status, [str(one) for one in arguments], standalone_mode=False)
    if isinstance(got.exception, UserError):
        return 2, str(got.exception)
    assert got.exception is None, got.exception
    return 0, got.output


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_page_the_table_and_the_object(training: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setenv("COLUMNS", "200")
    training.checkpoint(50, 8)
    other = Run(tmp_path / "two")
    before = contents(tmp_path)
    code, page = said(training.folder)
    assert code == 0
    page = "\n".join(" ".join(line.split()) for line in page.splitlines())
    assert "\nstate training, last heard of 3 s ago\n" in page
    assert "step 20 of 100 (20.0%), 4 min left, until " in page
    assert "step 8, 49 s old, 12 step(s) would be lost\n" in page
    assert "dropped rows 3, the newest: longer than 4096 tokens" in page
    _, table = said(training.folder, other.folder)
    assert [line.split()[0] for line in table.splitlines()] == ["run", "one", "two"]
    assert json.loads(said(training.own, "--json")[1]) == training.summary()
    both = json.loads(said(training.folder, other.folder, "--json")[1])["runs"]
    assert [one["step"] for one in both] == [20, 0]
    assert contents(tmp_path) == before


def test_what_is_no_run_is_one_sentence(tmp_path: Path, run: Run) -> None:
    study = tmp_path / "study"
    (study / "runs/sft-123").mkdir(parents=True)
    (study / "runs/sft-123/node.json").write_text("{}")
    (tmp_path / "study.yaml").write_text("")
    for path, sentence in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "holds no run"),
        (study, "is a study's folder, no run; `mirage-ds ablate status"),
        (study / "runs/sft-123", "has not begun"),
        (tmp_path / "study.yaml", "is a file"),
    ):
        code, text = said(run.folder, path)
        assert code == 2
        assert text.startswith(f"{path}: ")
        assert sentence in text
    (study / "runs/sft-123/model").symlink_to(run.folder)
    assert find_run(study / "runs/sft-123") == study / "runs/sft-123/model"


def test_it_needs_no_torch_and_comes_at_once(training: Run) -> None:
    code = """
import sys
from mirage_ds.cli import main
sys.argv = ["mirage-ds", "status", *sys.argv[1:]]
main()
print("loaded", sorted({"torch", "transformers", "deepspeed", "numpy", "matplotlib"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", code, str(training.folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("loaded []\n")
    assert "no sign of life" in shown or "training" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (723, "12 min 3 s"), (7260, "2 h 1 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["r/a/stage2", "r/b/stage2"], ["a/stage2", "b/stage2"]),
        (["r/x"], ["x"]),
        (["r/x", "r/x"], ["x", "x"]),
        (["r/x", "r/x/again"], ["x", "x/again"]),
        (["r/x", "r/y/x"], ["x", "y/x"]),
        (["r/a/1", "r/a/2", "q/a/2"], ["r/a/1", "r/a/2", "q/a/2"]),
    ],
)
def test_names_are_what_differs(folders: list[str], names: list[str]) -> None:
    assert short_names([Path("/" + folder) for folder in folders]) == names


def test_watching_looks_again_until_it_is_stopped(training: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mirage_ds.errors import Stopped

    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        training.step(0, 20 + len(looks))
        if len(looks) == 3:
            raise Stopped

    monkeypatch.setattr(time, "sleep", sleep)
    lines = said(training.folder, "--json", "--watch", "5")[1].splitlines()
    assert looks == [5, 5, 5]
    assert [json.loads(line)["step"] for line in lines] == [20, 21, 22]
