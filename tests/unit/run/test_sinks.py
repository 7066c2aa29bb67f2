"""TensorBoard, Weights & Biases and MLflow: what they are handed, and that a run that goes on is one run there.

The two trackers are stand-ins that write down their calls; docs/watching.md says which versions were tried for real.
"""

from __future__ import annotations

import io
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mirage_ds.errors import Stopped, UserError
from mirage_ds.run.journal import Journal, Logs
from mirage_ds.run.sinks import Sink, open_sinks

METRICS = {"loss": 1.5, "ce": 2.0, "grad_norm": float("nan"), "lr": 1e-3, "micro_steps": 1, "skipped": 0,
           "model_flops": 4e9, "rows": 8, "tokens": 100}  # fmt: skip
SCORES = {"loss": 1.25, "sim": 0.5, "token_ce": 2.0, "correct": 0.5, "invalid": 0.25, "count": 4, "low": 0.1}
EVALUATION = {"eval/loss": 1.25, "eval/sim": 0.5, "eval/correct": 0.5, "scores/token_ce": 2.0, "scores/invalid": 0.25}
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
            journal.evaluation(steps, SCORES)
            journal.pictures(steps, {"said": "    *up*", "picture": Image.new("RGB", (40, 20), "red")}, "answers")
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
    logs = [call[1] for call in wandb_calls if call[0] == "log" and "loss/loss" in call[1]]
    assert [one["optimizer_step"] for one in logs] == [1, 2, 3, 3, 4, 3, 4, 5, 6]
    assert logs[0]["loss/loss"] == 1.5
    assert logs[0]["speed/mfu"] > 0
    assert "speed/model_flops" not in logs[0]
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
    assert [step for step, values in only.metrics if "loss/loss" in values] == [1, 2, 3, 3, 4, 3, 4, 5, 6]
    assert next((step, values) for step, values in only.metrics if "eval/loss" in values) == (3, EVALUATION)


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


@pytest.fixture
def board(tmp_path: Path) -> Any:
    """TensorBoard's own view of two runs: one that finished, and one that failed, went on, and runs still."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    for name, stage, rate, start, steps, error in (
        ("first", "sft", 1e-3, 0, 3, None),
        ("second", "stage1", 0.25, 0, 3, ZeroDivisionError()),
        ("second", "stage1", 0.25, 2, 4, Stopped()),
    ):
        settings = {**SETTINGS, "stage": stage, "learning_rate": rate, "data_path": ["a", "b"], "train_vision": True}
        folder = tmp_path / name / "run"
        run(folder, open_sinks(["tensorboard"], folder, name, settings, start), start, steps, error)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    return MultiplexerDataProvider(multiplexer, str(tmp_path))


def test_tensorboard_draws_a_run_that_went_on_as_one(board: Any) -> None:
    from tensorboard.context import RequestContext

    asked = {"ctx": RequestContext(), "experiment_id": ""}
    shown = board.read_scalars(**asked, plugin_name="scalars", downsample=99)
    assert set(shown) == {"first/run/sft", "second/run/stage1"}
    curves = shown["second/run/stage1"]
    assert [one.step for one in curves["loss/loss"]] == [1, 2, 3, 4]
    # TensorBoard opens the first two groups: these must be what helps most.
    groups = sorted({tag.split("/")[0] for tag in curves})
    assert groups == ["eval", "loss", "optimizer", "records", "scores", "speed"]
    opened = [tag for tag in curves if tag.split("/")[0] in groups[:2]]
    assert sorted(opened) == ["eval/correct", "eval/loss", "eval/sim", "loss/ce", "loss/loss"]
    texts = board.read_tensors(**asked, plugin_name="text", downsample=99)["second/run/stage1"]
    assert [one.step for one in texts["settings/text_summary"]] == [0, 2]
    assert b"\n    learning_rate: 0.25\n" in texts["settings/text_summary"][1].numpy[0]
    assert b"python" in texts["command/text_summary"][0].numpy[0]
    # What was shown beyond the step from which the run went on is there once.
    assert [(one.step, one.numpy.tolist()) for one in texts["answers/said/text_summary"]] == [(4, [b"    *up*"])]
    images = board.read_blob_sequences(**asked, plugin_name="images", downsample=99)["second/run/stage1"]
    (shown,) = images["answers/picture"]
    # The values of an image: width, height, the file.
    picture = board.read_blob(ctx=asked["ctx"], blob_key=shown.values[2].blob_key)
    assert (shown.step, Image.open(io.BytesIO(picture)).size) == (4, (40, 20))


def test_tensorboard_compares_settings_and_last_scores(board: Any) -> None:
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.get_experiment import Handler as Columns
    from tensorboard.plugins.hparams.list_session_groups import Handler as Lines

    asked = (RequestContext(), Context(TBContext(data_provider=board)), "")
    columns = Columns(*asked, api_pb2.GetExperimentRequest()).run()
    assert {one.name for one in columns.hparam_infos if one.differs} == {"stage", "learning_rate"}
    # What a run of stage1 alone has is a column too.
    assert {"eval/correct", "eval/sim", "loss/loss"} <= {one.name.tag for one in columns.metric_infos}
    statuses = [getattr(api_pb2, f"STATUS_{name}") for name in ("UNKNOWN", "RUNNING", "SUCCESS", "FAILURE")]
    wanted = api_pb2.ListSessionGroupsRequest(allowed_statuses=statuses, slice_size=9)
    lines = {one.name: one for one in Lines(*asked, wanted).run().session_groups}
    first, second = lines["first/run/sft"], lines["second/run/stage1"]
    assert [one.sessions[0].status for one in (first, second)] == [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
    assert first.hparams["learning_rate"].number_value == 1e-3
    assert second.hparams["data_path"].string_value == '["a", "b"]'
    assert second.hparams["train_vision"].string_value == "true"
    assert second.hparams["lora_rank"].string_value == "not set"
    assert {one.name.tag: one.value for one in second.metric_values}["eval/correct"] == 0.5


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
