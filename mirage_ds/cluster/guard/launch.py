"""The guard around a launcher: `python -m mirage_ds.cluster.guard.launch --master A --port P -- deepspeed …`.

It ends with the job's own exit code and prints why as the last lines. SIGTERM, SIGUSR1 and Ctrl-C become a request to
save and leave, which the launchers themselves do not pass on; a second Ctrl-C ends the job at once. A launcher that
waits for a dead connection is ended; when this guard or its launcher is killed, the ranks' guards hear of it and end
the job.
"""

import asyncio
import os
import signal
from collections.abc import Sequence
from typing import NoReturn

import click

from mirage_ds.cluster.guard.judge import STOPPED
from mirage_ds.cluster.guard.watch import CONTEXT, OPTIONS, SAYS, Child, adopt_orphans, end, leave, listen, talk
from mirage_ds.cluster.guard.wire import LAUNCHER_S, Bounds, Client
from mirage_ds.errors import EXIT_STOPPED
from mirage_ds.run.process import run_rank


@click.command(context_settings=CONTEXT, params=[*OPTIONS])
@click.option("--master", required=True, help="Rank 0's host, as this host knows it.")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED)
def command(port: int, job: str, master: str, words: tuple[str, ...], **bounds: float) -> None:
    """Run the launcher's command WORDS; end when the job ends, however that comes."""
    adopt_orphans()
    asyncio.run(watch(words, Client(master, port, job, None, Bounds(**bounds))))


async def watch(words: Sequence[str], client: Client) -> NoReturn:
    """Start the launcher, keep in touch with the hub, leave as the job does."""
    asked = 0

    def stop(number: signal.Signals) -> None:
        nonlocal asked
        asked += 1
        if asked > 1 and number == signal.SIGINT:
            client.end(128 + number, f"{number.name} at the launcher")
        elif client.connected:
            client.say({"stop": True})
        else:
            # Before the ranks run there is nothing to save.
            client.end(EXIT_STOPPED, STOPPED)

    # Before the launcher, which may be stopped as soon as it is there.
    listen(stop)
    child = Child(words, {**os.environ, SAYS: str(os.getpid())}, own_session=True)
    # The hub wants nothing of a launcher.
    verdict = await talk(child, client, lambda message: None, stop)
    if asked and not client.connected:
        child.process.send_signal(signal.SIGTERM)
    await end(child, client.bounds.grace + LAUNCHER_S)
    leave(verdict)


if __name__ == "__main__":
    run_rank(command, alone=True)
