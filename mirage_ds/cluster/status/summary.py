"""What a run is doing and how far it is, as plain values: what `mirage-ds status --json` prints. Imports no torch.

The state is inferred from files: a folder shows no processes, and a process that is killed writes nothing. So a run
counts as silent when it has written nothing for longer than what it does can take: a step some usual steps, a save or
an evaluation some times its longest so far, a start the time that the guards give it.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any, Literal, NamedTuple

from mirage_ds.cluster.status.facts import Facts, Line
from mirage_ds.errors import EXIT_STOPPED
from mirage_ds.run import events

Name = Literal["starting", "training", "sampling", "evaluating", "saving", "finished", "stopped", "failed", "silent"]
ALIVE = ("starting", "training", "sampling", "evaluating", "saving")

# Steps of which medians and means are taken.
RECENT = 50
# So many times what it usually takes, and so many seconds at least, may pass without a word.
PATIENCE, LEAST_S = 10.0, 60.0
# Without an earlier one to compare with, as the guards have it (guard.wire.Bounds.start).
LOADS_S = 3600.0
# What has begun → (what ends it, state, detail).
PAIRS: dict[str, tuple[str, Name, str]] = {
    events.SAVE_BEGINS: (events.SAVE_ENDS, "saving", "a checkpoint"),
    events.SAVE_WAITS: (events.SAVE_ENDS, "saving", "a checkpoint"),
    events.MODEL_BEGINS: (events.MODEL_ENDS, "saving", "the model"),
    events.EVALUATION_BEGINS: (events.EVALUATION_ENDS, "evaluating", ""),
    events.ROLLOUT_BEGINS: (events.SCORING_BEGINS, "sampling", "answers"),
    events.SCORING_BEGINS: (events.ROLLOUT_ENDS, "sampling", "rewards"),
}
# What ends a run → state, detail.
ENDS: dict[str, tuple[Name, str]] = {events.MODEL_ENDS: ("finished", ""), events.STOPPED: ("stopped", "on request")}


class State(NamedTuple):
    """Where a run stands.

    Attributes:
        detail: the phase of a start, the reason of a failure, …; may be empty.
        since: when it was last heard of, or ended, in seconds since 1970.
    """

    name: Name
    detail: str
    since: float


def judge(facts: Facts, now: float) -> State:
    """Say what a run is doing; `now` is in seconds since 1970."""
    if (ended := _ended(facts)) is not None:
        return ended
    # Logs of earlier versions have no time in their lines.
    logged = [one["time"] for one in facts.steps[-1:] + facts.evaluations[-1:] if "time" in one] or [facts.logged]
    heard = max([*logged, *(one["time"] for one in facts.events)])
    name, detail, usual = _doing(facts, [one["event"] for one in facts.recent])
    if now - heard <= (LOADS_S if usual is None else max(LEAST_S, PATIENCE * usual)):
        return State(name, detail, heard)
    return State("silent", f"it was {name}{f' ({detail})' if detail else ''}", heard)


def _usual_step(facts: Facts) -> float | None:
    """Median seconds of the last steps."""
    return median(float(one["seconds"]) for one in facts.steps[-RECENT:]) if facts.steps else None


def _ended(facts: Facts) -> State | None:
    """Return how the newest start ended; None while it may be running."""
    for one in reversed(facts.recent):
        if one["event"] in ENDS:
            return State(*ENDS[one["event"]], one["time"])
    # The guards know more than the rank that failed.
    if facts.verdicts and (last := facts.verdicts[-1])["time"] >= facts.began:
        if last["code"] == EXIT_STOPPED:
            return State(*ENDS[events.STOPPED], last["time"])
        return State("failed", f"{last['why'][-1]} (exit code {last['code']})", last["time"])
    failed = [one for one in facts.recent if one["event"] == events.FAILED]
    return State("failed", str(failed[-1].get("why", "")), failed[-1]["time"]) if failed else None


def _doing(facts: Facts, names: list[str]) -> tuple[Name, str, float | None]:
    """Return state, detail, and how many seconds it usually takes until the next word; None where nobody knows."""
    if events.LOAD_ENDS not in names:
        phases = [one.removeprefix(events.PHASE) for one in names if one.startswith(events.PHASE)]
        return "starting", phases[-1] if phases else "", None
    if names[-1] in PAIRS:
        end, name, detail = PAIRS[names[-1]]
        return name, detail, _longest(facts, names[-1], end)
    start = next(one for one in reversed(facts.events) if one["event"] == events.LOAD_ENDS).get("step", 0)
    if not facts.steps or facts.steps[-1]["step"] <= start:
        return "starting", "first step", None
    return "training", "", _usual_step(facts)


def _longest(facts: Facts, begin: str, end: str) -> float | None:
    """Longest time from one event to the next, of those that came to their end; None where none has."""
    marks = [one for one in facts.events if one["event"] in (begin, end)]
    whole = [two for two in pairwise(marks) if [one["event"] for one in two] == [begin, end]]
    # With --async_save, steps are taken in between.
    spans = (ended.get("held_seconds", ended["time"] - begun["time"]) for begun, ended in whole)
    return max(spans, default=None)


def clock(when: float) -> str:
    """Write a time as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def summary(facts: Facts, now: float) -> dict[str, Any]:
    """Sum up a run. Times are seconds since 1970, durations seconds, rates a second; None is what is not known.

    Args:
        now: seconds since 1970.
    """
    state = judge(facts, now)
    recent = facts.steps[-RECENT:]
    last = recent[-1] if recent else {}
    step = int(last.get("step", facts.start.get("start", 0)))
    steps = facts.start.get("steps") or facts.settings.get("max_steps")
    left = (steps - step) * pace if steps and (pace := _pace(facts)) is not None else None
    if state.name == "finished":
        left = 0.0
    eta = left if state.name in ALIVE else None
    data = facts.settings.get("data_path")
    evaluated = {name: value for one in facts.evaluations[-1:] for name, value in one.items() if name != "time"}
    return {
        "run": str(facts.folder),
        "stage": facts.settings.get("stage"),
        "model": facts.settings.get("load_model_path") or facts.settings.get("model"),
        "data": " + ".join(data) if isinstance(data, list) else data,
        "world_size": facts.start.get("world_size"),
        "device": facts.start.get("device"),
        "state": state.name,
        "detail": state.detail,
        "since": state.since,
        "silent_seconds": max(0.0, now - state.since) if state.name in (*ALIVE, "silent") else None,
        "step": step,
        "steps": steps,
        "share": step / steps if steps else None,
        "work_left_seconds": left,
        "eta_seconds": eta,
        "ends_at": None if eta is None else now + eta,
        "recent_steps": len(recent),
        "loss": last.get("loss"),
        "loss_mean": _of(recent, "loss", mean),
        "learning_rate": last.get("lr"),
        "seconds_per_step": _usual_step(facts),
        "rows_per_second": _of(recent, "samples_per_second"),
        "tokens_per_second": _of(recent, "tokens_per_second"),
        "labels_per_second": _of(recent, "labels", per_second=True),
        "mfu": _of(recent, "mfu"),
        "memory_gb": last.get("memory_gb"),
        "data_share": _of(recent, "data_seconds", per_second=True),
        "checkpoint": _checkpoint(facts, step, now),
        "damaged_checkpoints": facts.damaged,
        "evaluation": {name.removeprefix("eval_"): value for name, value in evaluated.items()} or None,
        "best": _best(facts),
        "faults": _faults(facts),
    }


def _of(
    lines: Sequence[Line], name: str, middle: Callable[[list[float]], float] = median, per_second: bool = False
) -> float | None:
    """Median or mean of a number over the lines that have it, finite; `per_second`: over the step's seconds."""
    having = [line for line in lines if line.get(name) is not None and (line["seconds"] or not per_second)]
    numbers = [line[name] / (line["seconds"] if per_second else 1) for line in having]
    finite = [number for number in numbers if math.isfinite(number)]
    return middle(finite) if finite else None


def _pace(facts: Facts) -> float | None:
    """Seconds from step to step, evaluations and saves included, since the newest start."""
    own = [one for one in facts.steps if one.get("time", -1) >= facts.began]
    if len(own) > 1:
        return float(own[-1]["time"] - own[0]["time"]) / (own[-1]["step"] - own[0]["step"])
    return _usual_step(facts)


def _checkpoint(facts: Facts, step: int, now: float) -> dict[str, Any] | None:
    if facts.saved is None:
        return None
    at, when = facts.saved
    return {"step": at, "time": when, "age_seconds": max(0.0, now - when), "steps_since": max(0, step - at)}


def _best(facts: Facts) -> dict[str, Any] | None:
    """Return the best evaluation: the one whose model is kept, else the one of the least loss."""
    if facts.best is not None:
        return {name: facts.best.get(name) for name in ("metric", "value", "step")}
    losses = [(one["eval_loss"], one["step"]) for one in facts.evaluations if one.get("eval_loss") is not None]
    return {"metric": "loss", "value": min(losses)[0], "step": min(losses)[1]} if losses else None


def _faults(facts: Facts) -> dict[str, dict[str, Any]]:
    """Count what went wrong or was left out, each with the newest one in words; only what there is."""

    def noted(event: str) -> list[tuple[float, str]]:
        return [(one["time"], str(one.get("why", ""))) for one in facts.events if one["event"] == event]

    loaded = [one for one in facts.recent if one["event"] == events.LOAD_ENDS]
    went_on = f"went on from step {loaded[0].get('step', 0)}" if loaded else "still loading"
    verdicts = [one for one in facts.verdicts if one["code"] != EXIT_STOPPED]
    timed = {
        "guards' verdicts": [(one["time"], str(one["why"][-1])) for one in verdicts],
        "failures": noted(events.FAILED),
        "failed saves": noted(events.SAVE_FAILED),
        "restarts": [(when, went_on) for when, _ in noted(events.LOAD_BEGINS)[1:]],
    }
    skipped = [one["step"] for one in facts.steps if one.get("skipped")]
    found = {
        "skipped steps": (len(skipped), f"step {skipped[-1]}{_records(facts, skipped[-1])}" if skipped else ""),
        "dropped rows": (int(facts.start.get("dropped", 0)), f"longer than {facts.settings.get('max_length')} tokens"),
        "skipped records": (facts.skipped_records, "listed in run/skipped.jsonl"),
    }
    found |= {name: (len(all_), f"{clock(all_[-1][0])}: {all_[-1][1]}") for name, all_ in timed.items() if all_}
    return {name: {"count": count, "newest": words} for name, (count, words) in found.items() if count}


def _records(facts: Facts, step: int) -> str:
    """Name the records of a skipped step."""
    of_step = [one.get("rows", []) for one in facts.odd if one.get("step") == step]
    records: list[Line] = of_step[-1] if of_step else []
    some = ", ".join(str(record.get("line")) for record in records[:4])
    return f" (records on line(s) {some}{' …' if records[4:] else ''})" if some else ""
