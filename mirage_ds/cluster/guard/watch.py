"""A process under guard: its output, its marks, its stacks, the watch over it, and its end with everything below it.

Both guards, around a rank and around a launcher, are made of this; their options stand here too.
"""

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
import psutil

from mirage_ds.cluster.guard.wire import BEAT_S, LAUNCHER_S, Bounds, Client, Verdict
from mirage_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR
from mirage_ds.run.heartbeat import MARKS_FD, STACKS_FD, STACKS_SIGNAL

# From linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Lines of error output that are kept to say why a process failed.
KEPT_LINES = 40
# In the environment of a launcher's ranks: the process of the guard around the launcher, which says why the job ends.
SAYS = "MIRAGE_GUARD_SAYS"
# The first word that is no option begins the guarded command; everything after it is passed on as it is.
CONTEXT = {"help_option_names": ["-h", "--help"], "ignore_unknown_options": True, "allow_interspersed_args": False}
SECONDS = click.FloatRange(min=0.1)
BOUNDS_HELP = {
    "gather": "Seconds until the last rank has appeared.",
    "silence": "Seconds without a sign of life after which a host counts as lost.",
    "start": "Seconds without progress before the first step, in a save or a load.",
    "hang": "Seconds without progress anywhere else.",
    "grace": "Seconds for a process to leave by itself once the job has to end.",
}
OPTIONS: list[click.Parameter] = [
    click.Option(["--port"], required=True, type=click.IntRange(1, 65535), help="Port of the hub on rank 0's host."),
    click.Option(["--job"], default="mirage-ds", show_default=True, help="The job's name, the same everywhere."),
]
OPTIONS += [
    click.Option([f"--{name}"], type=SECONDS, default=seconds, show_default=True, help=BOUNDS_HELP[name])
    for name, seconds in Bounds()._asdict().items()
]


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends: none can hide from `end_all`."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Let the kernel kill this new process when its parent, whose pid is given, ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before it could be watched.
        os._exit(1)


class Child:
    """A process that dies with its guard, whatever ends that.

    Attributes:
        progress: its last mark (heartbeat.py).
        folder: where its run keeps its files, once it has said so.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], log: Path | None = None, own_session: bool = False
    ):
        """Start it.

        Args:
            log: gets a copy of everything that it prints.
            own_session: whether a terminal's Ctrl-C reaches the guard alone.
        """
        self.progress: dict[str, Any] = {}
        self.folder: str | None = None
        self._asked = False
        self._last_lines: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._log = log.open("ab", buffering=0) if log else None
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        # A progress bar is drawn for people: their terminal is left to the process.
        direct = sys.stdout.isatty() and log is None
        reading, writing = os.pipe()
        handed = {MARKS_FD: str(writing), STACKS_FD: str(self._stacks.fileno())}
        self.process = subprocess.Popen(
            command,
            env=environment | handed,
            stdout=None if direct else subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(writing, self._stacks.fileno()),
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # there is no other thread yet
            start_new_session=own_session,
        )
        os.close(writing)
        # Threads: the console may be a pipe that nobody empties any more, and the guard itself must never wait for it.
        copied = ((self.process.stderr, sys.stderr.buffer), (self.process.stdout, sys.stdout.buffer))
        self._threads = [
            threading.Thread(target=self._read_marks, args=(os.fdopen(reading, "rb"),), daemon=True),
            *(threading.Thread(target=self._copy, args=pair, daemon=True) for pair in copied if pair[0]),
        ]
        for thread in self._threads:
            thread.start()

    def _copy(self, source: BinaryIO, console: BinaryIO) -> None:
        there = True
        rest = b""
        while chunk := os.read(source.fileno(), 1 << 16):
            if self._log:
                self._log.write(chunk)
            if source is self.process.stderr:
                *whole, rest = (rest + chunk)[-(1 << 16) :].split(b"\n")
                self._last_lines.extend(whole)
            if there:
                try:
                    console.write(chunk)
                    console.flush()
                except (OSError, ValueError):
                    # The launcher is gone; the log goes on, and the guard hears of it elsewhere.
                    there = False
        if rest:
            self._last_lines.append(rest)

    def _read_marks(self, pipe: BinaryIO) -> None:
        for line in pipe:
            message = json.loads(line)
            if "folder" in message:
                self.folder = message["folder"]
            else:
                self.progress = message

    def returned(self) -> int | None:
        """Return the exit code as a shell has it (128 + N where signal N killed it), None while it runs."""
        code = self.process.poll()
        if self._asked and code == -signal.SIGTERM:
            # It was still importing and could not listen: nothing was begun, nothing is lost.
            return EXIT_STOPPED
        return code if code is None or code >= 0 else 128 - code

    def state(self) -> str:
        """Return the state of the process that has not been waited for, as psutil has it."""
        return str(psutil.Process(self.process.pid).status())

    def why(self) -> str:
        """Say in a few words why the ended process failed: its last line of error output, or the signal."""
        code = self.process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (the kernel, when memory runs out, or somebody)" if code == -signal.SIGKILL else ""
            return f"was killed by {name}{hint}"
        said = [line.decode(errors="replace").strip() for line in self._last_lines]
        last = next((line for line in reversed(said) if line), "")
        return f"ended with exit code {code}" + (f": {last[-300:]}" if last else " and said nothing")

    def stop(self) -> None:
        """Ask the process to save and leave."""
        self._asked = True
        self.process.send_signal(signal.SIGTERM)

    def ask_for_stacks(self) -> None:
        """Let the process write its stacks; before its first mark the signal would end it (heartbeat.guarded)."""
        if self.progress:
            self.process.send_signal(STACKS_SIGNAL)

    def stacks(self) -> str:
        """Return the stacks that the process has written so far."""
        return os.pread(self._stacks.fileno(), 1 << 20, 0).decode(errors="replace")

    def finish_output(self, seconds: float = 2.0) -> None:
        """Wait until what the process printed has been passed on; a console that takes nothing is given up."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


def end_all() -> None:
    """Kill every process below this one."""
    me = psutil.Process()
    # Killing a parent hands its children to this process: look until nobody is left.
    for _ in range(20):
        below = [
            one for one in me.children(recursive=True) if one.is_running() and one.status() != psutil.STATUS_ZOMBIE
        ]
        if not below:
            return
        for one in below:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(below, timeout=0.5)


def tell(lines: Sequence[str]) -> None:
    """Print the guard's lines to the error output; a console that is gone keeps nobody from leaving."""
    with suppress(OSError):
        for line in lines:
            print(f"guard: {line}", file=sys.stderr, flush=True)  # after every other line of the job


def listen(stop: Callable[[signal.Signals], None]) -> None:
    """Call `stop` on the signals that ask for an end."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)


async def talk(
    child: Child, client: Client, hear: Callable[[dict[str, Any]], None], stop: Callable[[signal.Signals], None]
) -> Verdict:
    """Tell the hub twice a second how the process is, until there is a verdict.

    Args:
        hear: takes the hub's requests, "stop" and "stacks"; stop: takes the signals that ask for an end.
    """
    listen(stop)
    talking = asyncio.create_task(client.run(hear))
    ended: float | None = None
    while client.verdict is None:
        code = child.returned()
        if code is None:
            client.say({"state": child.state(), "progress": child.progress, "folder": child.folder})
        else:
            ended = ended or time.monotonic()
            await asyncio.to_thread(child.finish_output)
            client.say({"ended": code, "why": child.why(), "folder": child.folder})
            if client.rank is None and (not client.connected or time.monotonic() - ended > LAUNCHER_S):
                client.end(code, f"the launcher {child.why()}")
        await asyncio.sleep(BEAT_S if code is None else BEAT_S / 5)
        client.judge()
    talking.cancel()
    return client.verdict


async def end(child: Child, seconds: float) -> None:
    """Give the process time to notice that the others are gone, then kill it and everything below it."""
    last = time.monotonic() + seconds
    while child.returned() is None and time.monotonic() < last:
        await asyncio.sleep(0.1)
    end_all()
    await asyncio.to_thread(child.finish_output)


def leave(verdict: Verdict, say: bool = True) -> NoReturn:
    """End this process at once, the reason as its last lines.

    Nothing is cleaned up: a thread may wait for a console or a disk that never answers, the event loop for its tasks.
    """
    # A user's error has been said by the rank itself.
    told = verdict.code == EXIT_USER_ERROR and "exit code 2: error: " in verdict.lines[-1]
    if say and verdict.code and not told:
        tell(verdict.lines)
    os._exit(verdict.code)
