"""The status of runs as text: a page for one, a table for several. Imports no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mirage_ds.cluster.status.summary import clock

Summary = Mapping[str, Any]


def duration(seconds: float) -> str:
    """Write a duration in its two largest units."""
    whole = round(seconds)
    for size, name, small, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def state_words(one: Summary) -> str:
    """Say what a run is doing."""
    name, detail = one["state"], one["detail"]
    if name == "silent":
        usual = one["seconds_per_step"]
        took = f"; a step takes {usual:.2f} s" if usual is not None else ""
        return f"no sign of life for {duration(one['silent_seconds'])} ({detail}{took})"
    said = f"{name}: {detail}" if detail else name
    return said if one["silent_seconds"] is None else f"{said}, last heard of {duration(one['silent_seconds'])} ago"


def short_state(one: Summary) -> str:
    """Say the same in a word or two."""
    if one["state"] == "silent":
        return f"silent {duration(one['silent_seconds'])}"
    return f"starting: {one['detail']}" if one["state"] == "starting" and one["detail"] else str(one["state"])


def lines_of(one: Summary) -> dict[str, str]:
    """Return what is known of a run: name → text."""
    what = [one["stage"] or "settings not written yet", one["model"], one["data"]]
    steps = f" of {one['steps']} ({one['share']:.1%}){_rest(one)}" if one["steps"] else ""
    recent, best, evaluation = one["recent_steps"], one["best"], one["evaluation"] or {}
    has_loss = one["loss_mean"] is not None
    loss = f"{_number(one['loss'], '.4f')} now, {one['loss_mean']:.4f} mean of the last {recent}" if has_loss else ""
    measured = [f"{name} {_number(value, '.4f')}" for name, value in evaluation.items() if name != "step"]
    lines = {
        "run": one["run"],
        "what": ", ".join(str(part) for part in what if part),
        "where": f"{one['world_size']} rank(s) on {one['device']}" if one["world_size"] else "",
        "state": state_words(one),
        "progress": f"step {one['step']}{steps}",
        "loss": loss,
        "learning rate": _number(one["learning_rate"], ".2e") if has_loss else "",
        "throughput": f"{_throughput(one)} (median of the last {recent})" if recent else "",
        "memory": f"{one['memory_gb']:.2f} GB at most on rank 0" if one["memory_gb"] is not None else "",
        "waits for data": f"{one['data_share']:.1%} of a step" if one["data_share"] is not None else "",
        "checkpoint": _checkpoint(one),
        "damaged": ", ".join(one["damaged_checkpoints"]),
        "evaluation": f"after step {evaluation['step']}: {' '.join(measured)}" if evaluation else "",
        "best": f"{best['metric']} {_number(best['value'], '.4f')} after step {best['step']}" if best else "",
        "faults": "" if one["faults"] else "none",
    }
    lines |= {name: f"{fault['count']}, the newest: {fault['newest']}" for name, fault in one["faults"].items()}
    return {name: text for name, text in lines.items() if text}


def _number(value: float | None, how: str) -> str:
    return "not finite" if value is None else format(value, how)


def _rest(one: Summary) -> str:
    if one["eta_seconds"] is not None:
        return f", {duration(one['eta_seconds'])} left, until {clock(one['ends_at'])}"
    left = one["work_left_seconds"]
    return f", {duration(left)} of work left" if left else ""


def _throughput(one: Summary) -> str:
    parts = [f"{one['seconds_per_step']:.2f} s a step"]
    for key, unit in (("rows_per_second", "rows/s"), ("tokens_per_second", "tok/s"), ("labels_per_second", "labels/s")):
        if one[key] is not None:
            parts.append(f"{one[key]:.{1 if one[key] < 100 else 0}f} {unit}")
    if one["mfu"] is not None:
        parts.append(f"mfu {one['mfu']:.1%}")
    return ", ".join(parts)


def _checkpoint(one: Summary) -> str:
    saved = one["checkpoint"]
    if saved is None:
        return "none"
    lost = f", {saved['steps_since']} step(s) would be lost" if one["state"] != "finished" else ""
    return f"step {saved['step']}, {duration(saved['age_seconds'])} old{lost}"


def print_one(one: Summary, console: Console) -> None:
    """Print all that is known of a run."""
    lines = lines_of(one)
    width = max(map(len, lines))
    for name, text in lines.items():
        # Soft-wrapped: a path can be copied whole.
        console.print(Text(f"{name:<{width}}  {text}"), soft_wrap=True)


def print_several(several: Sequence[Summary], console: Console) -> None:
    """Print a line a run."""
    table = Table(
        Column("run", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("stage", "state")),
        *(Column(name, justify="right", no_wrap=True) for name in ("step", "left", "loss", "tok/s", "mfu", "saved")),
        Column("faults", overflow="fold"),
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = short_names([Path(one["run"]) for one in several])
    for name, one in zip(names, several, strict=True):
        mfu, saved = one["mfu"], one["checkpoint"]
        cells = (
            name,
            one["stage"] or "",
            short_state(one),
            f"{one['step']}/{one['steps'] or '?'}",
            duration(one["eta_seconds"]) if one["eta_seconds"] is not None else "",
            "" if one["loss_mean"] is None else f"{one['loss_mean']:.4f}",
            "" if one["tokens_per_second"] is None else f"{one['tokens_per_second']:.0f}",
            "" if mfu is None else f"{mfu:.1%}",
            "–" if saved is None else str(saved["step"]),
            ", ".join(f"{fault['count']} {kind}" for kind, fault in one["faults"].items()),
        )
        table.add_row(*map(Text, cells))
    console.print(table)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Leave out the folders that all paths begin with; every path keeps at least its last folder."""
    paths = [folder.resolve() for folder in folders]
    above = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(above)) for path in paths]
