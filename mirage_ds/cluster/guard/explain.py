"""Who was late: from the ranks' marks and stacks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mirage_ds.run.heartbeat import COLLECTIVE

if TYPE_CHECKING:
    from mirage_ds.cluster.guard.hub import Member

# What a rank waits for, by the files and functions on its main thread's stack; the first that fits.
WAITS = (
    ("another rank (a collective)", r"distributed_c10d\.py|deepspeed/comm/"),
    ("its data (loader workers)", r"utils/data/dataloader\.py|mirage_ds/data/"),
    ("the disk", r"torch/serialization\.py|safetensors|in fsync|mirage_ds/files\.py|engine/checkpoint\.py"),
)
# Ranks that the lines speak of one by one.
SHOWN = 16


def main_stack(stacks: str) -> list[str]:
    """Return the frames of the main thread, innermost first, from what faulthandler writes."""
    threads = re.split(r"(?m)^(?=(?:Current thread|Thread) )", stacks)
    # faulthandler writes the thread that was started first last.
    frames = [re.findall(r"(?m)^  File (.+)$", thread) for thread in threads]
    whole = [one for one in frames if one]
    return whole[-1] if whole else []


def waits_for(stacks: str) -> str:
    """Say what a rank waits for; its innermost frame where nothing is known of it."""
    frames = main_stack(stacks)
    if not frames:
        return "something unknown: it wrote no stacks"
    # The innermost frames say it; every rank's outer ones are those of the loop.
    for frame in frames[:12]:
        for what, pattern in WAITS:
            if re.search(pattern, frame):
                return what
    return frames[0]


def where(one: Member) -> str:
    """Say where a rank is."""
    step = one.progress.get("step")
    return f"{one.progress.get('doing', 'has not begun')}" + (f", step {step}" if step is not None else "")


def by_position(members: Sequence[Member]) -> tuple[str, ...]:
    """Say where the living ranks are, the last ones first; nothing where all are at the same mark."""
    ranks = [one for one in members if one.rank is not None and one.code is None and one.progress]
    counts = {one.progress["count"] for one in ranks}
    if len(counts) < 2:
        return ()
    ranks.sort(key=lambda one: (one.progress["count"], one.rank or 0))
    lines = [f"{one.name}: {where(one)}" + _waiting(one) for one in ranks[:SHOWN]]
    return (*lines, *([f"… and {len(ranks) - SHOWN} more"] if len(ranks) > SHOWN else []))


def _waiting(one: Member) -> str:
    return f", waits for {waits_for(one.stacks)}" if one.stacks else ""


def late(ranks: Sequence[Member]) -> str:
    """Name the rank that the others wait for."""
    marked = [one for one in ranks if one.progress]
    if not marked:
        return "no rank has said where it is"
    behind = min(marked, key=lambda one: one.progress["count"])
    ahead = max(marked, key=lambda one: one.progress["count"])
    if behind.progress["count"] == ahead.progress["count"]:
        apart = [one for one in marked if one.stacks and "collective" not in waits_for(one.stacks)]
        if len(apart) == 1:
            return f"{apart[0].name} was late: {where(apart[0])}, waits for {waits_for(apart[0].stacks)}"
        return f"all ranks are at the same place: {where(behind)}{_waiting(behind)}"
    if behind.progress.get("kind") == COLLECTIVE:
        # It cannot be late for what the others have left behind without it.
        return (
            f"{ahead.name} went past a collective in which {behind.name} still waits ({where(behind)}); "
            f"it is at: {where(ahead)}"
        )
    return f"{behind.name} was late: {where(behind)}{_waiting(behind)}"
