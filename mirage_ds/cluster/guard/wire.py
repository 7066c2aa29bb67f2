"""What the guards say to each other: JSON objects, one a line, over TCP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

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
    while True:
        try:
            line = await reader.readline()
            if not line.endswith(b"\n"):
                return
            message = json.loads(line)
        except (OSError, ValueError):
            return
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
