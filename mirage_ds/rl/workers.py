"""Processes that run a user's code: each call has a time limit, and one that dies takes nothing along.

Not `multiprocessing`'s own: its spawn runs the main script again, and that imports torch; its pools wait for ever for a
process that was killed, and cannot end one call. A process here is a fresh Python in a session of its own. It imports
what it is told, sees no GPU, since plan knows of no context there, and writes what it prints to standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

from mirage_ds.errors import UserError

Call = TypeVar("Call")
# Imports of a user's modules; some bring torch, from a slow disk.
START_S = 300.0
# A process ends itself at the limit and says where it was; one that cannot is killed so much later.
GRACE_S = 2.0
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mirage_ds.rl.workers import serve; "
    "serve(int(sys.argv[2]))"
)


class Lost(NamedTuple):
    """Why a call has no result."""

    sentence: str


def serve(descriptor: int) -> None:
    """Answer calls until the other side is closed or gone; the whole of a worker process."""
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)
    # A thread of C ends the process, where Python's own would wait for a regular expression to end.
    with suppress(EOFError, OSError):
        make, argument, limit_s = pipe.recv()
        faulthandler.dump_traceback_later(START_S, exit=True, file=2)
        try:
            answer = make(argument)
        except UserError as error:
            pipe.send(str(error))
            return
        faulthandler.cancel_dump_traceback_later()
        pipe.send(None)
        while True:
            call = pipe.recv()
            faulthandler.dump_traceback_later(limit_s, exit=True, file=2)
            result = answer(call)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(result)


class _Worker(Generic[Call]):
    """One process, started anew when it is lost.

    Attributes:
        call: what it is at.
        until: when it is given up.
    """

    def __init__(self, setup: tuple[Any, ...]):
        self.setup, self.limit_s, self.folder = setup, setup[-1], os.getcwd()
        self.call: Call | None = None
        self.until = 0.0
        self.start()

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps([*map(str, sys.path)]), str(theirs.fileno())],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()
        self.ready = False
        with suppress(OSError):
            self.pipe.send(self.setup)

    def wait_until_ready(self) -> None:
        """Wait until it has imported what it needs.

        Raises:
            UserError: it cannot.
        """
        if self.ready:
            return
        fault: str | None = f"nothing imported within {START_S:g} s"
        try:
            if self.pipe.poll(START_S + GRACE_S):
                fault = self.pipe.recv()
        except (EOFError, OSError):
            fault = f"{self._ended()} while it imported them"
        if fault:
            raise UserError(fault, everywhere=False)
        self.ready = True

    def take(self, call: Call) -> None:
        """Begin a call; a process that died while it waited is replaced."""
        while True:
            self.wait_until_ready()
            try:
                self.pipe.send(call)
                break
            except OSError:
                self.end()
                self.start()
        self.call, self.until = call, time.monotonic() + self.limit_s + GRACE_S

    def result(self) -> Any:
        """Return what the call came to, Lost where the process is gone or late; then it is replaced."""
        late = time.monotonic() >= self.until - GRACE_S
        result: Any = None
        with suppress(EOFError, OSError):
            result = self.pipe.recv() if self.pipe.poll() else None
        if result is None:
            result = Lost(f"takes longer than {self.limit_s:g} s" if late else self._ended())
            self.end()
            self.start()
        self.call = None
        return result

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        code = self.process.returncode
        if code is None:
            return "closes the pipe of its process"
        if code < 0:
            return f"ends its process by {signal.Signals(-code).name}" + (
                " (out of memory?)" if -code == signal.SIGKILL else ""
            )
        return f"ends its process with code {code}"

    def end(self) -> None:
        """End the process and all that it has started; one that waits for a call ends by itself."""
        self.pipe.close()
        if self.call is None and self.ready:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.call = None


class Workers(Generic[Call]):
    """Worker processes; leave none by `close`.

    Args:
        make: called once in each process with `argument`; what it returns answers a call. Both, and calls and
            results, can be pickled.
        limit_s: seconds for a call.
        count: processes.
    """

    def __init__(self, make: Callable[[Any], Callable[[Call], Any]], argument: Any, limit_s: float, count: int):
        self.workers: list[_Worker[Call]] = [_Worker((make, argument, limit_s)) for _ in range(count)]

    def wait_until_ready(self) -> None:
        """Wait for all of them; UserError where one cannot import what it needs."""
        for worker in self.workers:
            worker.wait_until_ready()

    def run(self, calls: deque[Call]) -> Iterator[tuple[Call, Any]]:
        """Yield (call, result or Lost) in the order in which they end; what is added to `calls` meanwhile runs too."""
        try:
            while calls or any(worker.call is not None for worker in self.workers):
                for worker in self.workers:
                    if calls and worker.call is None:
                        worker.take(calls.popleft())
                busy = {worker.pipe: worker for worker in self.workers if worker.call is not None}
                first = min(worker.until for worker in busy.values())
                ready = wait(list(busy), max(0.0, first - time.monotonic()))
                for pipe, worker in busy.items():
                    if pipe in ready or time.monotonic() >= worker.until:
                        call = worker.call
                        assert call is not None
                        yield call, worker.result()
        finally:
            # Whoever stops in the middle wants no late result.
            for worker in self.workers:
                if worker.call is not None:
                    worker.end()
                    worker.start()

    def close(self) -> None:
        """End them."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.end()
