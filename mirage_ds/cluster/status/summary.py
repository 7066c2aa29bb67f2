"""What a run is doing and how far it is, as plain values: what `mirage-ds status --json` prints. Imports no torch.

The state is inferred from files: a folder shows no processes, and a process that is killed writes nothing. So a run
counts as silent when it has written nothing for longer than what it does can take: a step some usual steps, a save or
an evaluation some times its longest so far, a start the time that the guards give it.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any, Literal, NamedTuple

from mirage_ds.cluster.status.facts import Facts, Line
from mirage_ds.errors import EXIT_STOPPED
from mirage_ds.run import events

Name = Literal["starting", "training", "evaluating", "saving", "finished", "stopped", "failed", "silent"]
ALIVE = ("starting", "training", "evaluating", "saving")

# Steps of which medians and means are taken.
RECENT = 50
# So many times what it usually takes, and so many seconds at least, may pass without a word.
PATIENCE, LEAST_S = 10.0, 60.0
# Without an earlier one to compare with, as the guards have it (guard.wire.Bounds.start).
LOADS_S = 3600.0
# What has begun → (what ends it, state, detail).
PAIRS: dict[str, tuple[str, Name, str]] = {
    events.SAVE_BEGINS: (events.SAVE_ENDS, "saving", "a checkpoint"),
    events.MODEL_BEGINS: (events.MODEL_ENDS, "saving", "the model"),
    events.EVALUATION_BEGINS: (events.EVALUATION_ENDS, "evaluating", ""),
}


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
    recent = _newest_start(facts)
    if (ended := _ended(facts, recent)) is not None:
        return ended
    # Logs of earlier versions have no time in their lines.
    logged = [one["time"] for one in facts.steps[-1:] + facts.evaluations[-1:] if "time" in one] or [facts.logged]
    heard = max([*logged, *(one["time"] for one in facts.events)])
    name, detail, patience = _doing(facts, [one["event"] for one in recent])
    if now - heard <= patience:
        return State(name, detail, heard)
    return State("silent", f"it was {name}{f' ({detail})' if detail else ''}", heard)


def _newest_start(facts: Facts) -> list[Line]:
    """Return the events of the newest start."""
    begins = [at for at, one in enumerate(facts.events) if one["event"] == events.LOAD_BEGINS]
    return facts.events[begins[-1] :] if begins else facts.events


def _usual_step(facts: Facts) -> float | None:
    """Median seconds of the last steps."""
    return median(float(one["seconds"]) for one in facts.steps[-RECENT:]) if facts.steps else None


def _ended(facts: Facts, recent: list[Line]) -> State | None:
    """Return how the newest start ended; None while it may be running."""
    for one in reversed(recent):
        if one["event"] == events.MODEL_ENDS:
            return State("finished", "", one["time"])
        if one["event"] == events.STOPPED:
            return State("stopped", "on request", one["time"])
    began = recent[0]["time"] if recent else 0.0
    verdicts = [one for one in facts.verdicts if one.get("time", 0) >= began]
    if verdicts:
        last, when = verdicts[-1], verdicts[-1].get("time", 0.0)
        if last["code"] == EXIT_STOPPED:
            return State("stopped", "on request", when)
        return State("failed", f"{last['why'][-1]} (exit code {last['code']})", when)
    failed = [one for one in recent if one["event"] == events.FAILED]
    return State("failed", str(failed[-1].get("why", "")), failed[-1]["time"]) if failed else None


def _doing(facts: Facts, names: list[str]) -> tuple[Name, str, float]:
    """Return state, detail, and how many seconds may pass without a word."""
    if events.LOAD_ENDS not in names:
        phases = [one.removeprefix(events.PHASE) for one in names if one.startswith(events.PHASE)]
        return "starting", phases[-1] if phases else "", LOADS_S
    if names[-1] in PAIRS:
        end, name, detail = PAIRS[names[-1]]
        took = _longest(facts, names[-1], end)
        return name, detail, LOADS_S if took is None else max(LEAST_S, PATIENCE * took)
    start = next(one for one in reversed(facts.events) if one["event"] == events.LOAD_ENDS).get("step", 0)
    step = _usual_step(facts)
    if step is None or facts.steps[-1]["step"] <= start:
        return "starting", "first step", LOADS_S
    return "training", "", max(LEAST_S, PATIENCE * step)


def _longest(facts: Facts, begin: str, end: str) -> float | None:
    """Longest time from one event to the next, of those that came to their end; None where none has."""
    found, begun = [], None
    for one in facts.events:
        if one["event"] == begin:
            begun = one["time"]
        elif one["event"] == end and begun is not None:
            found.append(one["time"] - begun)
            begun = None
    return max(found, default=None)


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
        "evaluation": _evaluation(facts),
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
    begun = _newest_start(facts)
    since = begun[0]["time"] if begun else 0.0
    own = [one for one in facts.steps if one.get("time", -1) >= since]
    if len(own) > 1:
        return float(own[-1]["time"] - own[0]["time"]) / (own[-1]["step"] - own[0]["step"])
    return _usual_step(facts)


def _checkpoint(facts: Facts, step: int, now: float) -> dict[str, Any] | None:
    if facts.saved is None:
        return None
    at, when = facts.saved
    return {"step": at, "time": when, "age_seconds": max(0.0, now - when), "steps_since": max(0, step - at)}


def _evaluation(facts: Facts) -> dict[str, Any] | None:
    if not facts.evaluations:
        return None
    return {name.removeprefix("eval_"): value for name, value in facts.evaluations[-1].items() if name != "time"}


def _best(facts: Facts) -> dict[str, Any] | None:
    """Return the best evaluation: the one whose model is kept, else the one of the least loss."""
    if facts.best is not None:
        return {name: facts.best.get(name) for name in ("metric", "value", "step")}
    losses = [(one["eval_loss"], one["step"]) for one in facts.evaluations if one.get("eval_loss") is not None]
    return {"metric": "loss", "value": min(losses)[0], "step": min(losses)[1]} if losses else None


def _faults(facts: Facts) -> dict[str, dict[str, Any]]:
    """Count what went wrong or was left out, each with the newest one in words; only what there is."""

    def newest(lines: Sequence[Line], words: str) -> str:
        return f"{clock(lines[-1].get('time', 0))}: {words}" if lines else ""

    skipped = [one["step"] for one in facts.steps if one.get("skipped")]
    verdicts = [one for one in facts.verdicts if one["code"] != EXIT_STOPPED]
    failed, unsaved, starts = (
        [one for one in facts.events if one["event"] == name]
        for name in (events.FAILED, events.SAVE_FAILED, events.LOAD_BEGINS)
    )
    loaded = [one for one in _newest_start(facts) if one["event"] == events.LOAD_ENDS]
    went_on = f"went on from step {loaded[0].get('step', 0)}" if loaded else "still loading"
    found = {
        "skipped steps": (len(skipped), f"step {skipped[-1]}{_records(facts, skipped[-1])}" if skipped else ""),
        "dropped rows": (int(facts.start.get("dropped", 0)), f"longer than {facts.settings.get('max_length')} tokens"),
        "skipped records": (facts.skipped_records, "listed in run/skipped.jsonl"),
        "guards' verdicts": (len(verdicts), newest(verdicts, str(verdicts[-1]["why"][-1]) if verdicts else "")),
        "failures": (len(failed), newest(failed, str(failed[-1].get("why", "")) if failed else "")),
        "failed saves": (len(unsaved), newest(unsaved, str(unsaved[-1].get("why", "")) if unsaved else "")),
        "restarts": (max(0, len(starts) - 1), newest(starts, went_on)),
    }
    return {name: {"count": count, "newest": words} for name, (count, words) in found.items() if count}


def _records(facts: Facts, step: int) -> str:
    """Name the records of a skipped step."""
    of_step = [one.get("rows", []) for one in facts.odd if one.get("step") == step]
    records: list[Line] = of_step[-1] if of_step else []
    some = ", ".join(str(record.get("line")) for record in records[:4])
    return f" (records on line(s) {some}{' …' if records[4:] else ''})" if some else ""
