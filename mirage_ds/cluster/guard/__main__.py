"""The guard around one rank, which any launcher starts: `python -m mirage_ds.cluster.guard --port P MODULE …`."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import click
import psutil

from mirage_ds.cluster.guard.hub import Hub
from mirage_ds.cluster.guard.watch import CONTEXT, OPTIONS, SAYS, Child, adopt_orphans, end, leave, talk, tell
from mirage_ds.cluster.guard.wire import EXIT_HANG, Bounds, Client
from mirage_ds.engine.place import Place, find_place
from mirage_ds.run.process import run_rank

# The hub's last word needs that long to reach every guard.
FAREWELL_S = 1.0


@click.command(context_settings=CONTEXT, params=[*OPTIONS])
@click.option("--logs", type=click.Path(path_type=Path), help="Folder that gets rank<N>.log, what the rank printed.")
@click.option("--quoted", is_flag=True, help="The arguments are percent-encoded: a shell on the way changes nothing.")
# Passed by some launchers; the environment says it too.
@click.option("--local_rank", hidden=True, expose_value=False)
@click.argument("module")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    port: int, job: str, logs: Path | None, quoted: bool, module: str, arguments: tuple[str, ...], **bounds: float
) -> None:
    """Run `python -m MODULE ARGUMENTS…` as a rank and end it together with all the others."""
    place = find_place(os.environ)
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    words = [sys.executable, "-u", "-m", module, *(map(unquote, arguments) if quoted else arguments)]
    client = Client(place.master, port, job, place.rank, Bounds(**bounds))
    asyncio.run(watch(words, place, client, logs / f"rank{place.rank}.log" if logs else None))


async def watch(words: list[str], place: Place, client: Client, log: Path | None) -> NoReturn:
    """Start the rank, keep in touch with the hub, end the rank as the verdict says and leave."""
    hub = Hub(place.size, client.bounds, client.job, lambda line: tell([line])) if place.rank == 0 else None
    if hub:
        await hub.listen(client.port)
        judging = asyncio.create_task(hub.watch())
    child = Child(words, dict(os.environ) | place.variables(), log)

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
    await end(child, 0.0 if verdict.code == EXIT_HANG else client.bounds.grace)
    if hub:
        await asyncio.wait([judging], timeout=FAREWELL_S)
        await asyncio.sleep(FAREWELL_S)
    # Once a host: under some launchers each host has its own log. On this one the launcher's guard says it.
    leave(verdict, say=place.local_rank == 0 and not psutil.pid_exists(int(os.environ.get(SAYS, "-1"))))


if __name__ == "__main__":
    run_rank(command, alone=True)
