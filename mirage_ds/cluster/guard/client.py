"""A guard's connection to the hub, and what it concludes when the hub is gone."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

from mirage_ds.cluster.guard.wire import PAUSED_S, Bounds, Verdict, connect, messages, send
from mirage_ds.errors import EXIT_LOST, EXIT_USER_ERROR

# A sign of life is due this often, in seconds.
BEAT_S = 0.5


class Client:
    """Says what its guard knows, hears what the hub wants.

    Attributes:
        verdict: the hub's, or this guard's own where the hub is gone.
        connected: the hub has answered.
    """

    def __init__(self, host: str, port: int, job: str, rank: int | None, bounds: Bounds):
        self.host, self.port, self.bounds = host, port, bounds
        self.verdict: Verdict | None = None
        self.connected = False
        self._hello = {"job": job, "rank": rank, "host": socket.gethostname()}
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
            lines = (
                f"{hub} was not reached within {self.bounds.gather:.0f} s: it did not start, or the port is blocked",
            )
            self.verdict = self.verdict or Verdict(EXIT_LOST, lines)
            return
        self.say(self._hello)
        self._heard = time.monotonic()
        async for message in messages(reader):
            self._heard, self.connected = time.monotonic(), True
            if "verdict" in message:
                code, lines = message["verdict"]
                self.verdict = self.verdict or Verdict(code, tuple(lines))
                return
            if "refused" in message:
                self.verdict = Verdict(EXIT_USER_ERROR, (f"{hub}: {message['refused']}; choose another --port",))
                return
            on(message)
        self.verdict = self.verdict or Verdict(EXIT_LOST, (f"{hub} is gone",))

    def judge(self) -> None:
        """Give up a hub that has been silent for too long; called a few times a second."""
        now = time.monotonic()
        if now - self._judged > PAUSED_S:
            # This guard itself was stopped (Ctrl-Z, a debugger); what the hub has said waits in the socket.
            self._heard += now - self._judged
        self._judged = now
        if self.connected and self.verdict is None and now - self._heard > self.bounds.silence:
            silent = f"no sign of life of rank 0's host {self.host} for {self.bounds.silence:.0f} s"
            self.verdict = Verdict(EXIT_LOST, (f"{silent}: it or the network is gone",))
