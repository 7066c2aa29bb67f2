"""What the hub concludes from what it has heard and from the time alone: whether the job has to end, and who is late.

A member is a rank's guard or the one around the launcher.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from mirage_ds.cluster.guard.wire import EXIT_HANG, Bounds, Verdict
from mirage_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR
from mirage_ds.run.heartbeat import COLLECTIVE

# One failure brings others: within this time the hub hears them too and names the one that began.
SETTLE_S = 1.0
# A process that is stopped this long is not being looked at by a debugger's single step.
STOPPED_S = 3.0
# What a rank says that fails since another one is gone or late.
CONSEQUENCES = re.compile(
    "connection (closed|reset|refused)|broken pipe|timed out|timeout|socket|nccl|watchdog|gloo|store|peer"
)
# What a rank waits for, by the files and functions on its main thread's stack; the first that fits.
WAITS = (
    ("another rank (a collective)", r"distributed_c10d\.py|deepspeed/comm/"),
    ("its data (loader workers)", r"utils/data/dataloader\.py|mirage_ds/data/"),
    ("the disk", r"torch/serialization\.py|safetensors|in fsync|mirage_ds/files\.py|engine/checkpoint\.py"),
)
STOPPED = "stopped on request"
# Ranks that the lines speak of one by one.
SHOWN = 16


@dataclass
class Member:
    """What the hub has heard of one guard; times are time.monotonic.

    Attributes:
        rank: None for the launcher's.
        heard: when it last said anything; closed: its connection has ended.
        code, why: how its process ended, and `ended`, when the hub heard of it.
        stopped: since when its process has been stopped.
        progress: its process's last mark; progressed: when that came.
    """

    rank: int | None
    host: str
    heard: float
    closed: bool = False
    code: int | None = None
    why: str = ""
    ended: float = 0.0
    stopped: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    progressed: float = 0.0
    folder: str | None = None
    stacks: str = ""
    writer: asyncio.StreamWriter | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"the launcher on {self.host}" if self.rank is None else f"rank {self.rank} on {self.host}"

    def hear(self, message: dict[str, Any], now: float) -> None:
        """Take in a message."""
        self.heard = now
        if "ended" in message and self.code is None:
            self.code, self.why, self.ended = int(message["ended"]), str(message["why"]), now
        if "stacks" in message:
            self.stacks = message["stacks"]
        if "state" in message:
            self.stopped = (self.stopped or now) if message["state"] == psutil.STATUS_STOPPED else None
            if message["progress"] != self.progress:
                self.progress, self.progressed = message["progress"], now
        self.folder = message.get("folder") or self.folder


def failures(members: Sequence[Member]) -> list[Member]:
    """Return the ranks that failed, the one that began it first."""
    failed = [one for one in members if one.rank is not None and one.code not in (None, 0)]

    def follows(one: Member) -> bool:
        # A rank ends with this code where it has noticed by itself that another one is gone (engine/waiting.py).
        # Of a user's error that all have met, one says what it is.
        silent = one.code == EXIT_USER_ERROR and "said nothing" in one.why
        return silent or one.code == EXIT_LOST or CONSEQUENCES.search(one.why.lower()) is not None

    return sorted(failed, key=lambda one: (follows(one), one.ended))


def hanging(members: Sequence[Member], size: int, bounds: Bounds, now: float) -> bool:
    """Tell whether no rank has come on for longer than its kind of work may take."""
    ranks = [one for one in members if one.rank is not None and one.code is None]
    if len(ranks) < size or not all(one.progress for one in ranks):
        return False
    slow = any(one.progress["slow"] for one in ranks)
    return now - max(one.progressed for one in ranks) > (bounds.start if slow else bounds.hang)


def judge(members: Sequence[Member], size: int, bounds: Bounds, since: float, now: float) -> Verdict | None:
    """Judge the job, hangs apart; None while it may go on.

    Args:
        size: ranks of the job.
        since: when the hub began to listen.
    """
    ranks = [one for one in members if one.rank is not None]
    failed = failures(members)
    if failed and now - min(one.ended for one in failed) >= SETTLE_S:
        first, *others = failed
        if first.code == EXIT_STOPPED:
            return Verdict(EXIT_STOPPED, (STOPPED,))
        then = (f"then {one.name} {one.why}" for one in others[:8])
        return Verdict(int(first.code or 1), (*then, *by_position(members), f"{first.name} {first.why}"))
    for one in members:
        if one.code is None and one.closed:
            what = "was killed" if one.rank is None else "lost its guard, which was killed"
            return Verdict(EXIT_LOST, (*by_position(members), f"{one.name} {what}"))
        if one.code is None and now - one.heard > bounds.silence:
            silent = f"{one.name}: no sign of life for {bounds.silence:.0f} s, host or network is gone"
            return Verdict(EXIT_LOST, (*by_position(members), silent))
        if one.stopped is not None and now - one.stopped > STOPPED_S:
            return Verdict(EXIT_HANG, (f"{one.name} is stopped (SIGSTOP); the others wait for it",))
        left = one.rank is None and one.code is not None and any(other.code is None for other in ranks)
        if left and now - one.ended > SETTLE_S:
            return Verdict(one.code or EXIT_LOST, (f"{one.name} {one.why}",))
    absent = sorted(set(range(size)) - {one.rank for one in ranks if one.rank is not None})
    if not absent and all(one.code == 0 for one in ranks):
        return Verdict(0, ())
    if not absent or now - since < bounds.gather:
        return None
    some = ", ".join(map(str, absent[:SHOWN])) + (", …" if len(absent) > SHOWN else "")
    hosts = ", ".join(sorted({one.host for one in ranks}))
    late_ones = f"rank(s) {some} of {size} did not start within {bounds.gather:.0f} s; heard from {hosts}"
    return Verdict(EXIT_LOST, (late_ones,))


def main_stack(stacks: str) -> list[str]:
    """Return the frames of the main thread, innermost first, from what faulthandler writes."""
    # No empty line stands between two answers. faulthandler writes the thread that was started first last.
    threads = re.split(r"(?m)^(?=(?:Current thread|Thread) )", stacks)
    whole = [frames for one in threads if (frames := re.findall(r"(?m)^  File (.+)$", one))]
    return whole[-1] if whole else []


def waits_for(stacks: str) -> str:
    """Say what a rank waits for; its innermost frame where nothing is known of it."""
    frames = main_stack(stacks)
    if not frames:
        return "something unknown: it wrote no stacks"
    # The innermost frames say it; every rank's outer ones are those of the loop.
    known = [what for frame in frames[:12] for what, pattern in WAITS if re.search(pattern, frame)]
    return known[0] if known else frames[0]


def where(one: Member) -> str:
    """Say where a rank is."""
    step = one.progress.get("step")
    parts = [one.progress.get("doing", "has not begun"), f"step {step}" if step is not None else ""]
    return ", ".join(filter(None, (*parts, f"waits for {waits_for(one.stacks)}" if one.stacks else "")))


def by_position(members: Sequence[Member]) -> tuple[str, ...]:
    """Say where the living ranks are, the last ones first; nothing where all are at the same mark."""
    ranks = [one for one in members if one.rank is not None and one.code is None and one.progress]
    counts = {one.progress["count"] for one in ranks}
    if len(counts) < 2:
        return ()
    ranks.sort(key=lambda one: (one.progress["count"], one.rank or 0))
    lines = [f"{one.name}: {where(one)}" for one in ranks[:SHOWN]]
    return (*lines, *([f"… and {len(ranks) - SHOWN} more"] if len(ranks) > SHOWN else []))


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
            return f"{apart[0].name} was late: {where(apart[0])}"
        return f"all ranks are at the same place: {where(behind)}"
    if behind.progress.get("kind") == COLLECTIVE:
        # It cannot be late for what the others have left behind without it.
        return (
            f"{ahead.name} went past a collective in which {behind.name} still waits ({where(behind)}); "
            f"it is at: {where(ahead)}"
        )
    return f"{behind.name} was late: {where(behind)}"
