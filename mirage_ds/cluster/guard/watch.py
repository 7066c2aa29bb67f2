"""What the guards around a rank and around a launcher share: their options, the watch over a process, its end."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from mirage_ds.cluster.guard.child import Child, end_all
from mirage_ds.cluster.guard.wire import BEAT_S, Bounds, Client, Verdict
from mirage_ds.errors import EXIT_USER_ERROR

# A launcher looks at its processes about once a second.
LAUNCHER_S = 10.0
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
