"""A run's status as one object of plain values: what `mirage-ds status --json` prints. Imports no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from mirage_ds.cluster.status.facts import Facts, Line
from mirage_ds.cluster.status.state import ALIVE, RECENT, attempt, judge, usual_step
from mirage_ds.errors import EXIT_STOPPED
from mirage_ds.run import events


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
    return {
        "run": str(facts.folder),
        "stage": facts.settings.get("stage"),
        "model": facts.settings.get("load_model_path") or facts.settings.get("model"),
        "data": " + ".join(data) if isinstance(data := facts.settings.get("data_path"), list) else data,
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
        "loss_mean": _of(recent, lambda one: one.get("loss"), mean),
        "learning_rate": last.get("lr"),
        "seconds_per_step": usual_step(facts),
        "rows_per_second": _of(recent, lambda one: one.get("samples_per_second"), median),
        "tokens_per_second": _of(recent, lambda one: one.get("tokens_per_second"), median),
        "labels_per_second": _of(recent, lambda one: _over(one.get("labels"), one["seconds"]), median),
        "mfu": _of(recent, lambda one: one.get("mfu"), median),
        "memory_gb": last.get("memory_gb"),
        "data_share": _of(recent, lambda one: _over(one.get("data_seconds"), one["seconds"]), median),
        "checkpoint": _checkpoint(facts, step, now),
        "damaged_checkpoints": facts.damaged,
        "evaluation": _evaluation(facts),
        "best": _best(facts),
        "faults": _faults(facts),
    }


def _over(number: float | None, by: float) -> float | None:
    return number / by if number is not None and by else None


def _of(
    lines: Sequence[Line], value: Callable[[Line], float | None], middle: Callable[[list[float]], float]
) -> float | None:
    """Mean or median of a number over the lines that have it, finite."""
    numbers = [float(one) for line in lines if (one := value(line)) is not None and math.isfinite(one)]
    return middle(numbers) if numbers else None


def _pace(facts: Facts) -> float | None:
    """Seconds from step to step, evaluations and saves included, since the newest start."""
    begun = attempt(facts)
    since = float(str(begun[0]["time"])) if begun else 0.0
    own = [one for one in facts.steps if float(one.get("time", -1)) >= since]
    if len(own) > 1:
        return float(own[-1]["time"] - own[0]["time"]) / (own[-1]["step"] - own[0]["step"])
    return usual_step(facts)


def _checkpoint(facts: Facts, step: int, now: float) -> dict[str, Any] | None:
    if facts.saved is None:
        return None
    at, when = facts.saved
    return {"step": at, "time": when, "age_seconds": max(0.0, now - when), "steps_since": max(0, step - at)}


def _evaluation(facts: Facts) -> dict[str, Any] | None:
    if not facts.evaluations:
        return None
    last = facts.evaluations[-1]
    return {name.removeprefix("eval_"): value for name, value in last.items() if name != "time"}


def _best(facts: Facts) -> dict[str, Any] | None:
    """Return the best evaluation: the one whose model is kept, else the one of the least loss."""
    if facts.best is not None:
        return {name: facts.best.get(name) for name in ("metric", "value", "step")}
    losses = [(one["eval_loss"], one["step"]) for one in facts.evaluations if one.get("eval_loss") is not None]
    return {"metric": "loss", "value": min(losses)[0], "step": min(losses)[1]} if losses else None


def _faults(facts: Facts) -> dict[str, dict[str, Any]]:
    """Count what went wrong or was left out, each with the newest one in words; only what there is."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, count: int, newest: str) -> None:
        if count:
            found[name] = {"count": count, "newest": newest}

    skipped = [one["step"] for one in facts.steps if one.get("skipped")]
    add("skipped steps", len(skipped), f"step {skipped[-1]}{_lines_of(facts, skipped[-1])}" if skipped else "")
    add("dropped rows", int(facts.start.get("dropped", 0)), f"longer than {facts.settings.get('max_length')} tokens")
    add("skipped records", facts.skipped_records, "listed in run/skipped.jsonl")
    verdicts = [one for one in facts.verdicts if one["code"] != EXIT_STOPPED]
    add("guards' verdicts", len(verdicts), _newest(verdicts, lambda one: str(one["why"][-1])))
    for name, event in (("failures", events.FAILED), ("failed saves", events.SAVE_FAILED)):
        own = [one for one in facts.events if one["event"] == event]
        add(name, len(own), _newest(own, lambda one: str(one.get("why", ""))))
    starts = [one for one in facts.events if one["event"] == events.LOAD_BEGINS]
    loaded = [one for one in attempt(facts) if one["event"] == events.LOAD_ENDS]
    went_on = f"went on from step {loaded[0].get('step', 0)}" if loaded else "still loading"
    add("restarts", len(starts) - 1, _newest(starts, lambda one: went_on))
    return found


def _newest(lines: Sequence[Line], say: Callable[[Line], str]) -> str:
    return f"{clock(float(lines[-1].get('time', 0)))}: {say(lines[-1])}" if lines else ""


def _lines_of(facts: Facts, step: int) -> str:
    """Name the records of a skipped step."""
    records: list[Line] = next(
        (one.get("records", []) for one in reversed(facts.not_finite) if one.get("step") == step), []
    )
    some = ", ".join(str(record.get("line")) for record in records[:4])
    return f" (records on line(s) {some}{' …' if records[4:] else ''})" if some else ""
