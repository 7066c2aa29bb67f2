"""The guard around one rank, which any launcher starts: `python -m mirage_ds.cluster.guard --port P MODULE …`."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import psutil

from mirage_ds.cluster.guard.child import Child, adopt_orphans
from mirage_ds.cluster.guard.hub import Hub
from mirage_ds.cluster.guard.watch import CONTEXT, SAYS, bounds_options, end, leave, talk, tell
from mirage_ds.cluster.guard.wire import EXIT_HANG, Bounds, Client, Verdict
from mirage_ds.engine.place import Place, find_place
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
        # Once a host: under some launchers each host has its own log. On this one the launcher's guard says it.
        leave(verdict, say=place.local_rank == 0 and not psutil.pid_exists(int(os.environ.get(SAYS, "-1"))))

    asyncio.run(until_the_end())


async def watch(words: list[str], place: Place, port: int, job: str, bounds: Bounds, log: Path | None) -> Verdict:
    """Start the rank, keep in touch with the hub, end the rank as the verdict says."""
    hub = Hub(place.size, bounds, job, lambda line: tell([line])) if place.rank == 0 else None
    if hub:
        await hub.listen(port)
        judging = asyncio.create_task(hub.watch())
    child = Child(words, dict(os.environ) | place.variables(), log)
    client = Client(place.master, port, job, place.rank, bounds)

    def hear(message: dict[str, Any]) -> None:
        if "stop" in message:
            child.stop()
        if "stacks" in message:
            child.ask_for_stacks()
            # The signal's handler writes at once, also in a process that waits.
            asyncio.get_running_loop().call_later(1.0, lambda: client.say({"stacks": child.stacks()}))

    def stop(_: signal.Signals) -> None:
        child.stop()
        client.say({"stop": True})

    verdict = await talk(child, client, hear, stop)
    await end(child, 0.0 if verdict.code == EXIT_HANG else bounds.grace)
    if hub:
        await asyncio.wait([judging], timeout=FAREWELL_S)
        await asyncio.sleep(FAREWELL_S)
    return verdict


if __name__ == "__main__":
    run_rank(command, alone=True)
