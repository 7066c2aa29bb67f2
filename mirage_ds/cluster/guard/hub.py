"""The hub in rank 0's guard: it hears every guard and judges the job. One verdict, told to all.

A member is a rank's guard or the one around the launcher. `judge` and what it calls are functions of what was heard and
of the time alone.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_ds.cluster.guard.explain import by_position, late
from mirage_ds.cluster.guard.wire import EXIT_HANG, LONGEST_LINE, PAUSED_S, Bounds, Verdict, messages, send
from mirage_ds.errors import EXIT_LOST, EXIT_STOPPED, UserError

# Between two looks of the hub, in seconds.
LOOK_S = 0.25
# One failure brings others: within this time the hub hears them too and names the one that began.
SETTLE_S = 1.0
# A process that is stopped this long is not being looked at by a debugger's single step.
STOPPED_S = 3.0
STACKS_S = 5.0
DISK_S = 3.0
# Files that the hub's process has besides its connections.
SPARE_FILES = 256
# What a rank says that fails since another one is gone or late.
CONSEQUENCES = re.compile(
    "connection (closed|reset|refused)|broken pipe|timed out|timeout|socket|nccl|watchdog|gloo|store|peer"
)


@dataclass
class Member:
    """What the hub has heard of one guard; times are time.monotonic.

    Attributes:
        rank: None for the launcher's.
        heard: when it last said anything; closed: its connection has ended.
        code, why: how its process ended, and `ended`, when the hub heard of it.
        state: of its process (child.py); stopped: since when that has been T.
        progress: its process's last mark; progressed: when that came.
    """

    rank: int | None
    host: str
    heard: float
    closed: bool = False
    code: int | None = None
    why: str = ""
    ended: float = 0.0
    state: str = "S"
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
            self.state = message["state"]
            self.stopped = (self.stopped or now) if self.state == "T" else None
            if message["progress"] != self.progress:
                self.progress, self.progressed = message["progress"], now
        self.folder = message.get("folder") or self.folder


def failures(members: Sequence[Member]) -> list[Member]:
    """Return the ranks that failed, the one that began it first."""
    failed = [one for one in members if one.rank is not None and one.code not in (None, 0)]

    def follows(one: Member) -> bool:
        # A rank ends with this code where it has noticed by itself that another one is gone (engine/waiting.py).
        return one.code == EXIT_LOST or CONSEQUENCES.search(one.why.lower()) is not None

    return sorted(failed, key=lambda one: (follows(one), one.ended))


def judge_failure(members: Sequence[Member], now: float) -> Verdict | None:
    """Judge ranks that have ended with another code than 0."""
    failed = failures(members)
    if not failed or now - min(one.ended for one in failed) < SETTLE_S:
        return None
    first = failed[0]
    if first.code == EXIT_STOPPED:
        return Verdict(EXIT_STOPPED, ("stopped on request",))
    others = tuple(f"then {one.name} {one.why}" for one in failed[1:9])
    return Verdict(int(first.code or 1), (*others, *by_position(members), f"{first.name} {first.why}"))


def judge_lost(members: Sequence[Member], bounds: Bounds, now: float) -> Verdict | None:
    """Judge guards that are gone or silent, and stopped processes."""
    for one in members:
        if one.code is None and one.closed:
            what = "was killed" if one.rank is None else "lost its guard, which was killed"
            return Verdict(EXIT_LOST, (*by_position(members), f"{one.name} {what}"))
        if one.code is None and now - one.heard > bounds.silence:
            return Verdict(
                EXIT_LOST,
                (
                    *by_position(members),
                    f"{one.name}: no sign of life for {bounds.silence:.0f} s, host or network is gone",
                ),
            )
        if one.stopped is not None and now - one.stopped > STOPPED_S:
            return Verdict(EXIT_HANG, (f"{one.name} is stopped (SIGSTOP); the others wait for it",))
        if one.rank is None and one.code is not None:
            living = [other for other in members if other.rank is not None and other.code is None]
            if living and now - one.ended > SETTLE_S:
                return Verdict(one.code or EXIT_LOST, (f"{one.name} {one.why}",))
    return None


def judge_gathering(members: Sequence[Member], size: int, bounds: Bounds, since: float, now: float) -> Verdict | None:
    """Judge a job whose ranks have not all come."""
    absent = sorted(set(range(size)) - {one.rank for one in members if one.rank is not None})
    if not absent or now - since < bounds.gather:
        return None
    some = ", ".join(map(str, absent[:16])) + (", …" if len(absent) > 16 else "")
    hosts = ", ".join(sorted({one.host for one in members if one.rank is not None}))
    return Verdict(
        EXIT_LOST, (f"rank(s) {some} of {size} did not start within {bounds.gather:.0f} s; heard from {hosts}",)
    )


def hanging(members: Sequence[Member], size: int, bounds: Bounds, now: float) -> bool:
    """Tell whether no rank has come on for longer than its kind of work may take."""
    ranks = [one for one in members if one.rank is not None and one.code is None]
    if len(ranks) < size or not all(one.progress for one in ranks):
        return False
    slow = any(one.progress["slow"] for one in ranks)
    return now - max(one.progressed for one in ranks) > (bounds.start if slow else bounds.hang)


def judge(members: Sequence[Member], size: int, bounds: Bounds, since: float, now: float) -> Verdict | None:
    """Judge the job, hangs apart; None while all is well.

    Args:
        size: ranks of the job.
        since: when the hub began to listen.
    """
    return (
        judge_failure(members, now)
        or judge_lost(members, bounds, now)
        or judge_gathering(members, size, bounds, since, now)
    )


def write_stacks(place: Path, ranks: Sequence[Member]) -> None:
    """Write each rank's stacks into a file of its own."""
    place.mkdir(exist_ok=True)
    for one in ranks:
        (place / f"rank{one.rank}.txt").write_text(one.stacks, encoding="utf-8", errors="replace")


class Hub:
    """Listens on a port of rank 0's host and tells its verdict to all."""

    def __init__(self, size: int, bounds: Bounds, job: str, say: Callable[[str], None]):
        """Make a hub.

        Args:
            size: ranks of the job.
            job: its name; guards of another one, that came to the wrong port, are refused.
            say: prints a line.
        """
        self.size, self.bounds, self.job, self.say = size, bounds, job, say
        self.members: list[Member] = []
        self.verdict: Verdict | None = None
        self.stopping = False
        self._since = time.monotonic()

    async def listen(self, port: int) -> None:
        """Open the port.

        Raises:
            UserError: somebody else has it.
        """
        # One connection a rank; many systems allow a process 1,024 files unless it asks for more.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, self.size + SPARE_FILES)), hard))
        try:
            server = await asyncio.start_server(self._serve, None, port, limit=LONGEST_LINE, backlog=self.size)
            if not server.sockets:
                # asyncio takes a socket that cannot be made for a missing address family, and would serve nobody.
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise UserError(
                    f"the guards' hub has no file left for port {port} (ulimit -n is "
                    f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}): raise it"
                ) from None
            raise UserError(
                f"port {port} for the guards cannot be opened ({os.strerror(error.errno or 0)}); "
                "another job on this host has it: choose another --port"
            ) from None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member: Member | None = None
        async for message in messages(reader):
            now = time.monotonic()
            if member is None:
                if message.get("job") != self.job:
                    send(writer, {"refused": f"this port belongs to job {self.job}, not to {message.get('job')}"})
                    break
                member = Member(message["rank"], message["host"], now, progressed=now, writer=writer)
                self.members.append(member)
            member.hear(message, now)
            if message.get("stop"):
                self.stop()
            send(writer, {"heard": True})
            if self.verdict:
                self._tell({"verdict": self.verdict})
        if member:
            member.closed = True
        writer.close()

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self.members:
            if member.writer and not member.closed:
                send(member.writer, message)

    def stop(self) -> None:
        """Ask every rank to save and leave."""
        if not self.stopping:
            self.stopping = True
            self._tell({"stop": True})

    async def watch(self) -> Verdict:
        """Judge until there is a verdict or every rank has ended well; tell all of them."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if now - last > PAUSED_S:
                # The hub was stopped: what others said in the meantime waits in the sockets.
                for member in self.members:
                    member.heard += now - last
                    member.progressed += now - last
            last = now
            verdict = judge(self.members, self.size, self.bounds, self._since, now)
            if verdict is None and hanging(self.members, self.size, self.bounds, now):
                verdict = await self._explain_hang()
            done = [one for one in self.members if one.rank is not None and one.code == 0]
            if verdict is None and len(done) == self.size:
                verdict = Verdict(0, ())
            if verdict:
                self.verdict = verdict
                self._tell({"verdict": verdict})
                await self._on_disk(self._write, verdict)
                return verdict

    async def _on_disk(self, work: Callable[..., None], *arguments: Any) -> None:
        """Write something, without waiting for a disk that hangs: the job has to end all the same."""
        try:
            await asyncio.wait_for(asyncio.to_thread(work, *arguments), DISK_S)
        except (OSError, TimeoutError) as error:
            self.say(f"the run folder cannot be written: {error or 'the disk does not answer'}")

    async def _explain_hang(self) -> Verdict:
        self._tell({"stacks": True})
        ranks = [one for one in self.members if one.rank is not None]
        end = time.monotonic() + STACKS_S
        while time.monotonic() < end and not all(one.stacks for one in ranks):
            await asyncio.sleep(LOOK_S)
        waited = time.monotonic() - max(one.progressed for one in ranks)
        folder = self._own_folder()
        if folder:
            await self._on_disk(write_stacks, folder / "stacks", ranks)
        else:
            for one in ranks:
                self.say(f"stacks of {one.name}:\n{one.stacks}")
        said = (f"the stacks of all ranks are in {folder / 'stacks'}",) if folder else ()
        return Verdict(EXIT_HANG, (f"nothing has moved for {waited:.0f} s", *by_position(ranks), *said, late(ranks)))

    def _own_folder(self) -> Path | None:
        return next((Path(one.folder) for one in self.members if one.folder), None)

    def _write(self, verdict: Verdict) -> None:
        """Add the verdict to the run's faults.jsonl."""
        folder = self._own_folder()
        if folder is None or verdict.code == 0:
            return
        line = {"time": time.time(), "job": self.job, "code": verdict.code, "why": list(verdict.lines)}
        with (folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
