"""What the guards say to each other: JSON objects, one a line, over TCP; and each guard's connection to the hub."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from mirage_ds.errors import EXIT_LOST, EXIT_USER_ERROR

# A sign of life is due this often, in seconds.
BEAT_S = 0.5
# A launcher looks at its processes about once a second, and may take so long to notice that they have ended.
LAUNCHER_S = 10.0

# Stacks of a rank with many threads are the longest message.
LONGEST_LINE = 4 << 20
# A guard that looks around several times a second, and for so long did not, was itself stopped.
PAUSED_S = 3.0


class Bounds(NamedTuple):
    """How long the guards wait, in seconds.

    Attributes:
        gather: for the last rank to appear.
        silence: for a sign of life of another guard.
        start: for a sign of progress before the first step, in a save and in a load.
        hang: for a sign of progress anywhere else.
        grace: for a process to leave by itself once the job has to end.
    """

    gather: float = 600.0
    silence: float = 30.0
    start: float = 3600.0
    hang: float = 900.0
    grace: float = 5.0


class Verdict(NamedTuple):
    """Why a job ends: its exit code, and lines that say why, the most telling one last."""

    code: int
    lines: tuple[str, ...]


# Exit codes of the guards are this one, sysexits' EX_SOFTWARE, and EXIT_LOST; a rank's own stands in every other case.
EXIT_HANG = 70


def send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """Queue a message; it never waits for the other side."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield messages until the connection ends, however it does; a line that is none ends it too."""
    with suppress(OSError, ValueError):
        async for line in reader:
            message = json.loads(line)
            if not isinstance(message, dict):
                return
            yield message


async def connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the hub, as often as it takes: the guards start in any order."""
    while True:
        try:
            return await asyncio.wait_for(asyncio.open_connection(host, port, limit=LONGEST_LINE), 5)
        except (OSError, TimeoutError):
            await asyncio.sleep(0.3)


class Client:
    """Says what its guard knows, hears what the hub wants.

    Attributes:
        rank: of the guarded process; None for the launcher.
        verdict: the hub's, or this guard's own where the hub is gone.
        connected: the hub has answered.
    """

    def __init__(self, host: str, port: int, job: str, rank: int | None, bounds: Bounds):
        self.host, self.port, self.job, self.rank, self.bounds = host, port, job, rank, bounds
        self.verdict: Verdict | None = None
        self.connected = False
        self._writer: asyncio.StreamWriter | None = None
        self._heard = self._judged = time.monotonic()

    def say(self, message: dict[str, Any]) -> None:
        """Send a message; before the connection stands it is dropped."""
        if self._writer:
            send(self._writer, message)

    async def run(self, on: Callable[[dict[str, Any]], None]) -> None:
        """Keep the connection until there is a verdict.

        Args:
            on: takes the hub's requests, "stop" and "stacks".
        """
        hub = f"the guard of rank 0 at {self.host}:{self.port}"
        try:
            reader, self._writer = await asyncio.wait_for(connect(self.host, self.port), self.bounds.gather)
        except TimeoutError:
            why = f"was not reached within {self.bounds.gather:.0f} s: it did not start, or the port is blocked"
            self.end(EXIT_LOST, f"{hub} {why}")
            return
        self.say({"job": self.job, "rank": self.rank, "host": socket.gethostname()})
        self._heard = time.monotonic()
        async for message in messages(reader):
            self._heard, self.connected = time.monotonic(), True
            if "verdict" in message:
                code, lines = message["verdict"]
                self.end(code, *lines)
            elif "refused" in message:
                self.end(EXIT_USER_ERROR, f"{hub}: {message['refused']}; choose another --port")
            else:
                on(message)
            if self.verdict:
                return
        self.end(EXIT_LOST, f"{hub} is gone")

    def end(self, code: int, *lines: str) -> None:
        """Take a verdict, where there is none yet."""
        self.verdict = self.verdict or Verdict(code, lines)

    def judge(self) -> None:
        """Give up a hub that has been silent for too long; called a few times a second."""
        now = time.monotonic()
        if now - self._judged > PAUSED_S:
            # This guard itself was stopped (Ctrl-Z, a debugger); what the hub has said waits in the socket.
            self._heard += now - self._judged
        self._judged = now
        if self.connected and now - self._heard > self.bounds.silence:
            silent = f"no sign of life of rank 0's host {self.host} for {self.bounds.silence:.0f} s"
            self.end(EXIT_LOST, f"{silent}: it or the network is gone")
