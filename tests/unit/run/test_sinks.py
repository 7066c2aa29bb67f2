"""TensorBoard, Weights & Biases and MLflow: what they are handed, and that a run that goes on is one run there.

The two trackers are stand-ins that write down their calls; docs/watching.md says which versions were tried for real.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mirage_ds.errors import Stopped, UserError
from mirage_ds.run.journal import Journal, Logs
from mirage_ds.run.sinks import Sink, open_sinks

METRICS = {"loss": 1.5, "ce": 2.0, "grad_norm": float("nan"), "lr": 1e-3, "micro_steps": 1, "skipped": 0,
           "model_flops": 4e9, "rows": 8, "tokens": 100}  # fmt: skip
SETTINGS = {"stage": "sft", "resume": "never", "learning_rate": 1e-3}


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    class Run:
        def __init__(self, identity: str):
            self.id = identity
            self.config = SimpleNamespace(update=lambda values, **how: calls.append(("config", values, how)))

        def define_metric(self, name: str, **how: Any) -> None:
            calls.append(("metric", name, how))

        def log(self, values: dict[str, Any]) -> None:
            calls.append(("log", values))

        def mark_preempting(self) -> None:
            calls.append(("preempting",))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    def init(**how: Any) -> Run:
        calls.append(("init", how))
        return Run(how.get("id", "w1"))

    stand_in(monkeypatch, "wandb", init=init, Error=type("Error", (Exception,), {}))
    return calls


class MLflowTracker:
    """Keeps runs as MLflow's server does: a parameter is written once."""

    class MlflowException(Exception):  # MLflow's own name
        pass

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.away = False
        self.active: Any = None

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        self._reach()
        if run_id is None:
            run_id = f"m{len(self.runs) + 1}"
            info = SimpleNamespace(run_id=run_id)
            self.runs[run_id] = SimpleNamespace(
                info=info, name=run_name, status="", data=SimpleNamespace(params={}), metrics=[]
            )
        if run_id not in self.runs:
            raise self.MlflowException(f"Run '{run_id}' not found")
        self.active = self.runs[run_id]
        self.active.status = "RUNNING"
        return self.active

    def log_params(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if self.active.data.params.setdefault(key, value) != value:
                raise self.MlflowException(f"Changing param values is not allowed: {key}")

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self._reach()
        self.active.metrics.append((step, values))

    def end_run(self, status: str) -> None:
        self._reach()
        self.active.status = status

    def _reach(self) -> None:
        if self.away:
            raise self.MlflowException("connection refused")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> MLflowTracker:
    made = MLflowTracker()
    names = ("start_run", "log_params", "log_metrics", "end_run", "MlflowException")
    stand_in(monkeypatch, "mlflow", **{name: getattr(made, name) for name in names})
    return made


def run(folder: Path, sinks: list[Sink], start: int, steps: int, error: BaseException | None = None) -> None:
    """Report steps start + 1 … steps, then end."""
    try:
        journal = Journal()
        with journal.logging(Logs(folder, 6, sinks, start=start, peak=1e9)):
            for step in range(start + 1, steps + 1):
                journal.step(step, step / 6, METRICS)
            journal.evaluation(steps, {"loss": 1.25})
            if error:
                raise error
    except (Stopped, ZeroDivisionError):
        pass


def test_wandb_follows_one_run_through_its_interruptions(tmp_path: Path, wandb_calls: list[Any]) -> None:
    folder = tmp_path / "first/run"
    for start, steps, error in ((0, 3, Stopped()), (2, 4, ZeroDivisionError()), (2, 6, None)):
        sinks = open_sinks(["wandb"], folder, "first", {**SETTINGS, "start": start}, start)
        run(folder, sinks, start, steps, error)
    inits = [call[1] for call in wandb_calls if call[0] == "init"]
    assert [(one["name"], one.get("id"), one.get("resume")) for one in inits] == [
        ("first", None, None), ("first", "w1", "allow"), ("first", "w1", "allow"),
    ]  # fmt: skip
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": "w1"}
    assert [call for call in wandb_calls if call[0] == "config"][2] == (
        "config", {**SETTINGS, "start": 2}, {"allow_val_change": True},
    )  # fmt: skip
    # Its counter cannot go back; the axis can.
    assert ("metric", "*", {"step_metric": "optimizer_step"}) in wandb_calls
    logs = [call[1] for call in wandb_calls if call[0] == "log" and "train/loss" in call[1]]
    assert [one["optimizer_step"] for one in logs] == [1, 2, 3, 3, 4, 3, 4, 5, 6]
    assert logs[0]["train/loss"] == 1.5
    assert logs[0]["train/mfu"] > 0
    assert "train/time" not in logs[0]
    ends = [call for call in wandb_calls if call[0] in ("preempting", "finish")]
    assert ends == [("preempting",), ("finish", 1), ("finish", 1), ("finish", 0)]


def test_mlflow_follows_one_run_through_its_interruptions(tmp_path: Path, tracker: MLflowTracker) -> None:
    folder = tmp_path / "first/run"
    states = []
    for start, steps, error in ((0, 3, Stopped()), (2, 4, ZeroDivisionError()), (2, 6, None)):
        # What changes from start to start must not be refused.
        settings = {**SETTINGS, "resume": "auto" if start else "never", f"new{start}": start}
        sinks = open_sinks(["mlflow"], folder, "first", settings, start)
        run(folder, sinks, start, steps, error)
        states.append(tracker.active.status)
    assert states == ["KILLED", "FAILED", "FINISHED"]
    (only,) = tracker.runs.values()
    assert only.name == "first"
    assert only.data.params == {"stage": "sft", "resume": "never", "learning_rate": "0.001", "new0": "0", "new2": "2"}
    assert [step for step, values in only.metrics if "train/loss" in values] == [1, 2, 3, 3, 4, 3, 4, 5, 6]
    assert next((step, values) for step, values in only.metrics if "eval/loss" in values) == (3, {"eval/loss": 1.25})


def test_a_tracker_that_is_away_is_said_and_ends_no_run(
    tmp_path: Path, tracker: MLflowTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    sinks = open_sinks(["mlflow"], tmp_path, "first", SETTINGS, 0)
    tracker.away = True
    run(tmp_path, sinks, 0, 2)
    said = capsys.readouterr().out
    assert "warning: MLflow has not taken the numbers of step 1 (MlflowException: connection refused)" in said
    assert "warning: MLflow has not taken how the run ended" in said
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match=r"--report_to mlflow: the run cannot be opened .*connection refused"):
        open_sinks(["mlflow"], tmp_path, "first", SETTINGS, 0)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, 3), (2, 4)):
        run(tmp_path, open_sinks(["tensorboard"], tmp_path, "first", SETTINGS, start), start, steps)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [one.step for one in board.Scalars("train/loss")] == [1, 2, 3, 4]
    assert {"train/mfu", "train/model_flops", "eval/loss"} <= set(board.Tags()["scalars"])


def test_mfu_is_the_share_of_the_peak_and_absent_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, peak in (("known", 1e12), ("unknown", None)):
        journal = Journal()
        with journal.logging(Logs(tmp_path / name, 1, [], peak=peak)):
            journal.step(1, 1.0, METRICS)
    known, unknown = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("known", "unknown"))
    assert known["mfu"] * 1e12 / 4e9 == pytest.approx(known["samples_per_second"] / 8)
    assert "mfu" not in unknown
    lines = capsys.readouterr().out.splitlines()
    assert " mfu " in lines[0]
    assert " mfu " not in lines[1]
