"""Whom the journal tells of an event: the guard on every rank, events.jsonl and the logs on rank 0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mirage_ds.config.run import LATENT_MEASURES
from mirage_ds.errors import Stopped, UserError
from mirage_ds.run import events
from mirage_ds.run.heartbeat import Heartbeat
from mirage_ds.run.journal import Journal, Logs
from mirage_ds.run.sinks import Sink


@contextmanager
def heard(marks: list[dict[str, Any]]) -> Iterator[Heartbeat]:
    """A heartbeat, and what the guard has heard of it in the end."""
    reading, writing = os.pipe()
    yield Heartbeat(writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        marks += [json.loads(line) for line in pipe]


def noted_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / events.FILE).read_text().splitlines()]


class Tracker(Sink):
    def __init__(self) -> None:
        self.end = ""
        self.values: dict[str, float] = {}

    def scalars(self, step: int, values: Any) -> None:
        self.values |= values

    def close(self, end: str) -> None:
        self.end = end


@pytest.mark.parametrize("writes", [True, False])
def test_an_event_is_told_once_to_all_whom_it_concerns(
    writes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks: list[dict[str, Any]] = []
    with heard(marks) as heartbeat:
        journal = Journal(heartbeat)
        # Nothing is written before the folder is this run's.
        journal.phase("records")
        assert list(tmp_path.iterdir()) == []
        journal.claimed(tmp_path, writes)
        journal.phase("model")
        journal.say("too early")
        with journal.logging(Logs(tmp_path, 4, [], tmp_path / "log.txt") if writes else None):
            journal.tell(events.SAVE_BEGINS, 2)
            journal.tell(events.SAVE_FAILED, 2, "no checkpoint", "disk full")
            journal.at("updates the weights", 3)
    assert marks[1] == {"folder": str(tmp_path)}
    told = [(one["doing"], one["step"], one["kind"]) for one in marks if "doing" in one]
    assert told == [
        ("records", None, "load"),
        ("model", None, "load"),
        ("saves a checkpoint", 2, "save"),
        ("updates the weights", 3, ""),
    ]
    if not writes:
        assert list(tmp_path.iterdir()) == []
        assert capsys.readouterr().out == ""
        return
    noted = [(one["event"], one.get("step"), one.get("why")) for one in noted_in(tmp_path)]
    assert noted == [("phase: model", None, None), ("save begins", 2, None), ("save failed", 2, "disk full")]
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "no checkpoint\n"


@pytest.mark.parametrize(
    ("error", "end"), [(None, "finished"), (Stopped(), "stopped"), (UserError("x"), "failed"), (KeyError(), "failed")]
)
def test_the_trackers_hear_how_the_run_ended(error: BaseException | None, end: str, tmp_path: Path) -> None:
    journal, tracker = Journal(), Tracker()
    with suppress(BaseException), journal.logging(Logs(tmp_path, 1, [tracker])):
        if error:
            raise error
    assert tracker.end == end


def taken(step: int, loss: float, skipped: int = 0) -> dict[str, Any]:
    """What the loop says of a step of 8 rows."""
    numbers = {"grad_norm": 2.0, "lr": 1e-3, "micro_steps": 1, "rows": 8, "tokens": 80, "model_flops": 1e9}
    return {"loss": loss, "ce": loss, "skipped": skipped, **numbers}


@pytest.mark.parametrize(
    ("every", "skipped", "said"),
    [
        (1, (), {step: 10.0 - step for step in range(1, 8)}),
        # The first step, every third and the last; losses are means over the steps since the line before.
        (3, (), {1: 9.0, 3: 7.5, 6: 5.0, 7: 3.0}),
        (3, (5,), {1: 9.0, 3: 7.5, 5: 5.5, 6: 4.0, 7: 3.0}),
        (10, (), {1: 9.0, 7: 5.5}),
    ],
)
def test_the_console_has_a_line_now_and_then_and_the_file_has_all(
    every: int, skipped: tuple[int, ...], said: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal()
    with journal.logging(Logs(tmp_path, 7, [], every=every)):
        for step in range(1, 8):
            journal.start_clock()
            journal.step(step, step / 7, taken(step, 10.0 - step, int(step in skipped)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {int(words[1].partition("/")[0]): float(words[words.index("loss") + 1]) for words in lines} == said
    assert [int(words[1].partition("/")[0]) for words in lines if words[-1] == "SKIPPED"] == list(skipped)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [one["loss"] for one in logged] == [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]


def test_what_ends_a_run_is_noted_in_one_line(tmp_path: Path) -> None:
    journal = Journal()
    journal.claimed(tmp_path, writes=True)
    journal.failed(UserError("a\nb"))
    journal.failed(ValueError("c"))
    assert [one["why"] for one in noted_in(tmp_path)] == ["a b", "ValueError: c"]
    # A folder that is gone hides no error.
    journal.claimed(tmp_path / "gone", writes=True)
    journal.failed(ValueError("d"))


def test_an_evaluations_measures_of_latents_are_a_group_of_their_own(tmp_path: Path) -> None:
    tracker, journal = Tracker(), Journal()
    alike = dict.fromkeys(LATENT_MEASURES, 0.5)
    with journal.logging(Logs(tmp_path, 4, [tracker])):
        journal.evaluation(2, {"loss": 1.0, "token_ce": 2.0, **alike, "success": 0.25, "invalid": 0.0, "count": 3.0})
    scores = {"eval/loss": 1.0, "scores/token_ce": 2.0, "eval/success": 0.25, "scores/invalid": 0.0}
    assert tracker.values == scores | {f"latents/{name}": 0.5 for name in LATENT_MEASURES}
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["eval_effective_rank"] == 0.5
