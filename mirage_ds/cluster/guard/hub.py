"""The hub in rank 0's guard: it hears every guard and judges the job (judge.py). One verdict, told to all."""

import asyncio
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mirage_ds.cluster.guard.judge import Member, by_position, hanging, judge, late
from mirage_ds.cluster.guard.wire import EXIT_HANG, LONGEST_LINE, PAUSED_S, Bounds, Verdict, messages, send
from mirage_ds.errors import UserError

# Between two looks of the hub, in seconds.
LOOK_S = 0.25
STACKS_S = 5.0
DISK_S = 3.0
# Files that the hub's process has besides its connections.
SPARE_FILES = 64


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
            UserError: somebody else has it, or this process may not open a file for each rank.
        """
        # One connection a rank; many systems allow a process 1,024 files unless it asks for more.
        needed, (soft, hard) = self.size + SPARE_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY != hard < needed:
            raise UserError(f"rank 0's guard needs {needed} open files and may have {hard}: raise ulimit -Hn there")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
        try:
            await asyncio.start_server(self._serve, None, port, limit=LONGEST_LINE, backlog=self.size)
        except OSError as error:
            what = f"port {port} for the guards cannot be opened ({os.strerror(error.errno or 0)})"
            raise UserError(f"{what}; another job on this host has it: choose another --port") from None

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
