"""What a run is doing, judged from its files alone: who only sees a folder sees no process. Imports no torch.

A process that is killed writes nothing. So a run counts as silent when it has written nothing for longer than what it
does can take: a step some usual steps, a save or an evaluation some times its longest so far, a start the time that
the guards give it.
"""

from __future__ import annotations

from statistics import median
from typing import Literal, NamedTuple

from mirage_ds.cluster.status.facts import Facts
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


def attempt(facts: Facts) -> list[dict[str, object]]:
    """Return the events of the newest start."""
    begins = [at for at, one in enumerate(facts.events) if one["event"] == events.LOAD_BEGINS]
    return facts.events[begins[-1] :] if begins else facts.events


def usual_step(facts: Facts) -> float | None:
    """Median seconds of the last steps."""
    return median(float(one["seconds"]) for one in facts.steps[-RECENT:]) if facts.steps else None


def heard_at(facts: Facts) -> float:
    """Return when the run last wrote something: a line of its log or an event."""
    last = facts.steps[-1:] + facts.evaluations[-1:]
    # Logs of earlier versions have no time in their lines.
    logged = max((float(one["time"]) for one in last if "time" in one), default=facts.logged)
    return max([logged, *(float(one["time"]) for one in facts.events)])


def judge(facts: Facts, now: float) -> State:
    """Say what a run is doing.

    Args:
        now: seconds since 1970.
    """
    recent = attempt(facts)
    began = float(str(recent[0]["time"])) if recent else 0.0
    names = [str(one["event"]) for one in recent]
    ended = _ended(facts, recent, began)
    if ended is not None:
        return ended
    heard = heard_at(facts)
    name, detail, patience = _doing(facts, names)
    quiet = now - heard
    if quiet <= patience:
        return State(name, detail, heard)
    was = f"{name}{f' ({detail})' if detail else ''}"
    return State("silent", f"it was {was}", heard)


def _ended(facts: Facts, recent: list[dict[str, object]], began: float) -> State | None:
    """Return how the newest start ended; None while it may be running."""
    for one in reversed(recent):
        when = float(str(one["time"]))
        if one["event"] == events.MODEL_ENDS:
            return State("finished", "", when)
        if one["event"] == events.STOPPED:
            return State("stopped", "on request", when)
    for verdict in reversed(facts.verdicts):
        when = float(verdict.get("time", 0))
        if when >= began and verdict["code"] == EXIT_STOPPED:
            return State("stopped", "on request", when)
        if when >= began:
            return State("failed", f"{verdict['why'][-1]} (exit code {verdict['code']})", when)
    for one in reversed(recent):
        if one["event"] == events.FAILED:
            return State("failed", str(one.get("why", "")), float(str(one["time"])))
    return None


def _doing(facts: Facts, names: list[str]) -> tuple[Name, str, float]:
    """Return state, detail, and how many seconds may pass without a word."""
    if events.LOAD_ENDS not in names:
        phases = [one.removeprefix(events.PHASE) for one in names if one.startswith(events.PHASE)]
        return "starting", phases[-1] if phases else "", LOADS_S
    last = names[-1]
    if last in PAIRS:
        end, name, detail = PAIRS[last]
        took = _longest(facts, last, end)
        return name, detail, LOADS_S if took is None else max(LEAST_S, PATIENCE * took)
    start = next(one for one in reversed(facts.events) if one["event"] == events.LOAD_ENDS).get("step", 0)
    step = usual_step(facts)
    if step is None or facts.steps[-1]["step"] <= start:
        return "starting", "first step", LOADS_S
    return "training", "", max(LEAST_S, PATIENCE * step)


def _longest(facts: Facts, begin: str, end: str) -> float | None:
    """Longest time from one event to the next, of those that came to their end; None where none has."""
    found, begun = [], None
    for one in facts.events:
        if one["event"] == begin:
            begun = float(one["time"])
        elif one["event"] == end and begun is not None:
            found.append(float(one["time"]) - begun)
            begun = None
    return max(found, default=None)
