"""The guard around one rank, which any launcher starts: `python -m mirage_ds.cluster.guard --port P MODULE …`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click

from mirage_ds.cluster.guard.child import Child, adopt_orphans, end_all
from mirage_ds.cluster.guard.client import BEAT_S, Client
from mirage_ds.cluster.guard.hub import Hub
from mirage_ds.cluster.guard.options import CONTEXT, bounds_options, leave, tell
from mirage_ds.cluster.guard.wire import EXIT_HANG, Bounds, Verdict
from mirage_ds.engine.place import Place, find_place
from mirage_ds.errors import EXIT_STOPPED
from mirage_ds.run.process import run_rank

# The hub's last word needs that long to reach every guard.
FAREWELL_S = 1.0


@click.command(context_settings=CONTEXT)
@bounds_options
@click.option("--logs", type=click.Path(path_type=Path), help="Folder that gets rank<N>.log, what the rank printed.")
@click.option("--quoted", is_flag=True, help="The arguments are percent-encoded: a shell on the way changes nothing.")
@click.option("--local_rank", hidden=True, help="Passed by some launchers; the environment says it too.")
@click.argument("module")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    port: int,
    job: str,
    logs: Path | None,
    quoted: bool,
    local_rank: str | None,
    module: str,
    arguments: tuple[str, ...],
    **bounds: float,
) -> None:
    """Run `python -m MODULE ARGUMENTS…` as a rank and end it together with all the others."""
    del local_rank
    place = find_place(os.environ)
    words = [unquote(word) for word in arguments] if quoted else list(arguments)
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"rank{place.rank}.log" if logs else None
    adopt_orphans()
    words = [sys.executable, "-u", "-m", module, *words]

    async def until_the_end() -> None:
        verdict = await watch(words, place, port, job, Bounds(**bounds), log)
        # One line a host: under some launchers each host has its own log.
        leave(verdict, say=place.local_rank == 0)

    asyncio.run(until_the_end())


async def watch(words: list[str], place: Place, port: int, job: str, bounds: Bounds, log: Path | None) -> Verdict:
    """Start the rank, keep in touch with the hub, end the rank as the verdict says."""
    hub = Hub(place.size, bounds, job, lambda line: tell([line])) if place.rank == 0 else None
    if hub:
        await hub.listen(port)
        judging = asyncio.create_task(hub.watch())
    child = Child(words, dict(os.environ) | place.variables(), log)
    client = Client(place.master, port, job, place.rank, bounds)
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        child.signal(signal.SIGTERM)

    def on(message: dict[str, Any]) -> None:
        if "stop" in message:
            stop()
        if "stacks" in message:
            child.ask_for_stacks()
            # The signal's handler writes at once, also in a process that waits.
            asyncio.get_running_loop().call_later(1.0, lambda: client.say({"stacks": child.stacks()}))

    def on_signal() -> None:
        stop()
        client.say({"stop": True})

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    talking = asyncio.create_task(client.run(on))
    while client.verdict is None:
        code = child.returned()
        if asked and code == 128 + signal.SIGTERM:
            # It was still importing and could not listen: nothing was begun, nothing is lost.
            code = EXIT_STOPPED
        folder = str(child.folder) if child.folder else None
        if code is None:
            client.say({"state": child.state(), "progress": child.progress, "folder": folder})
        else:
            await asyncio.to_thread(child.finish_output)
            client.say({"ended": code, "why": child.why(), "folder": folder})
        await asyncio.sleep(BEAT_S if code is None else BEAT_S / 5)
        client.judge()
    verdict = client.verdict
    await leave_by_itself(child, 0.0 if verdict.code == EXIT_HANG else bounds.grace)
    end_all()
    await asyncio.to_thread(child.finish_output)
    if hub:
        await asyncio.wait([judging], timeout=FAREWELL_S)
        await asyncio.sleep(FAREWELL_S)
    talking.cancel()
    return verdict


async def leave_by_itself(child: Child, seconds: float) -> None:
    """Give the process time to notice that the others are gone."""
    end = time.monotonic() + seconds
    while child.returned() is None and time.monotonic() < end:
        await asyncio.sleep(0.1)


def main() -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    run_rank(command, alone=True)


if __name__ == "__main__":
    main()
