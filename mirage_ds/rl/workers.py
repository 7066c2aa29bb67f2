"""Processes that run a user's code: each call has a time limit, and one that dies takes nothing along.

Not `multiprocessing`'s own: its spawn runs the main script again, and that imports torch; its pools wait for ever for a
process that was killed, and cannot end one call. A process here is a fresh Python in a session of its own. It imports
what it is told, sees no GPU, since plan knows of no context there, and writes what it prints to standard error.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from mirage_ds.errors import Stopped, UserError

# Imports of a user's modules; some bring torch, from a slow disk.
START_S = 300.0
# A process ends itself at the limit and says where it was; one that cannot is killed so much later.
GRACE_S = 2.0
# How often somebody who wants the run to stop is looked for.
LOOK_S = 1.0
_CHILD = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from mirage_ds.rl.workers import serve
serve(int(sys.argv[2]), int(sys.argv[3]))"""


class Lost(NamedTuple):
    """Why a call has no result."""

    sentence: str


def serve(descriptor: int, life: int) -> None:
    """Answer calls until the other side is closed or gone; the whole of a worker process.

    Args:
        descriptor: of the pipe of calls and results.
        life: of a pipe that ends when the run is gone, however it went.
    """
    if not os.fork():
        # A reward may wait for a program, or leave a thread that runs for ever: then nothing below sees the run's end.
        # This process does, and ends the worker and all that it has started.
        os.close(descriptor)
        os.read(life, 1)
        os.killpg(0, signal.SIGKILL)
    os.close(life)
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)

    def limited(limit_s: float, function: Callable[[Any], Any], argument: Any) -> Any:
        # A thread of C ends the process, where Python's own would wait for a regular expression to end.
        faulthandler.dump_traceback_later(limit_s, exit=True, file=2)
        result = function(argument)
        faulthandler.cancel_dump_traceback_later()
        return result

    with suppress(EOFError, OSError):
        make, argument, limit_s = pipe.recv()
        try:
            answer = limited(START_S, make, argument)
        except UserError as error:
            pipe.send(str(error))
            return
        pipe.send("")
        while True:
            pipe.send(limited(limit_s, answer, pipe.recv()))


class _Worker:
    """One process, started anew when it is lost.

    Attributes:
        call: what it is at; None while it waits.
        until: when the call is given up.
    """

    def __init__(self, setup: tuple[Any, Any, float]):
        self.setup, self.limit_s, self.folder = setup, setup[-1], os.getcwd()
        self.start()

    def start(self) -> None:
        """Start the process; it imports while others work."""
        self.call, self.until, self.ready = None, 0.0, False
        self.pipe, theirs = Pipe()
        # Only this process holds the end that is written to, and it never writes.
        life, self.life = Pipe(duplex=False)
        with theirs, life:
            given = [theirs.fileno(), life.fileno()]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, json.dumps([*map(str, sys.path)]), *map(str, given)],
                pass_fds=given, start_new_session=True, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=2, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        self._send(self.setup)

    def _send(self, what: Any) -> None:
        # Of a process that is gone the end of its pipe tells.
        with suppress(OSError):
            self.pipe.send(what)

    def wait_until_ready(self) -> None:
        """Wait until it has imported what it needs; UserError where it cannot."""
        fault = "" if self.ready else f"reward functions are not imported within {START_S:g} s"
        try:
            if fault and self.pipe.poll(START_S + GRACE_S):
                fault = self.pipe.recv()
        except (EOFError, OSError):
            fault = f"a process that imports reward functions {self._ended()}"
        if fault:
            raise UserError(fault, everywhere=False)
        self.ready = True

    def take(self, call: Any) -> None:
        """Begin a call."""
        self.wait_until_ready()
        self._send(call)
        self.call, self.until = call, time.monotonic() + self.limit_s + GRACE_S

    def result(self) -> Any:
        """Return what the call came to; Lost where the process is gone or late, and then another one is started."""
        late, result = time.monotonic() >= self.until - GRACE_S, None
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
        if code is None or code >= 0:
            return f"ends its process with code {code}" if code is not None else "closes its process's pipe"
        why = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"ends its process by {signal.Signals(-code).name}{why}"

    def end(self) -> None:
        """End the process and all that it has started; one that waits for a call ends by itself."""
        self.pipe.close()
        if self.call is None and self.ready:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.life.close()
        self.process.wait()


class Workers:
    """Worker processes; `close` leaves none.

    Args:
        make: called once in each process with `argument`; what it returns answers a call. They and calls and results
            can be pickled.
        limit_s: seconds for a call.
        count: processes.

    Raises:
        UserError: a process cannot import what it needs.
    """

    def __init__(self, make: Callable[[Any], Callable[[Any], Any]], argument: Any, limit_s: float, count: int):
        self.workers = [_Worker((make, argument, limit_s)) for _ in range(count)]
        try:
            for worker in self.workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def run(self, calls: deque[Any], asked: Callable[[], bool]) -> Generator[tuple[Any, Any]]:
        """Yield (call, result or Lost) in the order in which they end; what is added to `calls` meanwhile runs too.

        Raises:
            Stopped: `asked` says that somebody wants it.
        """
        try:
            while calls or any(worker.call is not None for worker in self.workers):
                if asked():
                    raise Stopped
                for worker in self.workers:
                    if calls and worker.call is None:
                        worker.take(calls.popleft())
                busy = [worker for worker in self.workers if worker.call is not None]
                left = min(worker.until for worker in busy) - time.monotonic()
                ready = wait([worker.pipe for worker in busy], min(max(0.0, left), LOOK_S))
                for worker in busy:
                    if worker.pipe in ready or time.monotonic() >= worker.until:
                        yield worker.call, worker.result()
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
