"""Running a study: every node once, those that are ready side by side, until nothing is left that can run.

A node is ready when the node whose model it needs is done. One that fails is tried as often as the study says; what
hangs on it stays undone, and everything else goes on. A stop is passed on to the nodes, which save where they can, and
the next start continues there. Imports no torch.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from mirage_ds.ablate.launch import Place, command, environment, for_hosts
from mirage_ds.ablate.nodes import Node, Study
from mirage_ds.ablate.store import Store
from mirage_ds.stop import EXIT_STOPPED, never

LOOK_S = 0.1
# What a stopped node may take to save.
GRACE_S = 600.0

Say = Callable[[str], None]


class Launch(NamedTuple):
    """What all nodes are started with: see launch.command and launch.environment."""

    environment: Mapping[str, str]
    threads: int


class Running(NamedTuple):
    """A node at work."""

    node: Node
    place: Place
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    held: ExitStack
    begun: float


def why(log: Path, code: int) -> str:
    """Say why a node failed: the last line of what it printed that says so, else its last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        # Of the last attempt alone, which begins with its command.
        text = file.read().decode(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    last = (errors or lines or ["it printed nothing"])[-1]
    return f"exit code {code}: {last.removeprefix('error: ')[:300]}"


def start(node: Node, study: Study, store: Store, place: Place, launch: Launch) -> Running | None:
    """Start a node; None where another process works at it, or it has been done meanwhile."""
    held = ExitStack()
    if not held.enter_context(store.hold(node)) or store.done(node) is not None:
        held.close()
        return None
    parent = study.nodes[node.parent] if node.parent else None
    store.prepare(node, parent)
    begun = time.time()
    if store.is_whole(node):
        # Its process ended well and ours did not live to write it down.
        store.finish(node, begun)
        held.close()
        return None
    log = store.log(node).open("ab")
    words = command(node, parent, store, place)
    found = environment(place, launch.environment, launch.threads)
    if place.hosts and node.kind == "train":
        found |= for_hosts(store.place(node), place, found)
    log.write(f"\n$ {' '.join(words)}\n".encode())
    log.flush()
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=found,
        # A Ctrl-C of the terminal reaches this process alone, which passes it on.
        start_new_session=True,
    )
    return Running(node, place, process, log, held, begun)


def end(one: Running, store: Store, code: int, stopping: bool) -> str | None:
    """Write down how a node ended; why it failed, or None.

    Args:
        stopping: it was asked to stop. However it ended then, it was no failure: the request may have met it before it
            listened.
    """
    one.log.close()
    failed = None
    if code == 0 and store.is_whole(one.node):
        store.finish(one.node, one.begun)
    else:
        failed = why(store.log(one.node), code)
        store.ended(one.node, one.begun, EXIT_STOPPED if stopping else code, failed)
    one.held.close()
    return failed


def ready(study: Study, store: Store, wanted: Iterable[str], busy: set[str]) -> Node | None:
    """Return the first node that can start now."""
    for key in wanted:
        node = study.nodes[key]
        waits = node.parent is not None and store.done(study.nodes[node.parent]) is None
        if key not in busy and not waits and store.state(node) == "waiting":
            return node
    return None


def run(
    study: Study,
    store: Store,
    places: list[Place],
    launch: Launch,
    say: Say,
    asked: Callable[[], bool] = never,
    wanted: Iterable[str] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> bool:
    """Run what is not done.

    Args:
        places: where nodes run, one at a time in each.
        say: is told when a node begins and ends.
        asked: whether somebody wants this process to stop.
        wanted: keys; all nodes if None.
        tick: is called several times a second.

    Returns:
        False where it was stopped.
    """
    keys = list(study.nodes if wanted is None else wanted)
    free, working = list(places), list[Running]()
    stopping = False
    since = 0.0
    while True:
        for one in list(working):
            code = one.process.poll()
            if code is None:
                continue
            working.remove(one)
            free.append(one.place)
            failed = end(one, store, code, stopping)
            took = f"{time.time() - one.begun:.0f} s"
            how = "stopped" if stopping else "failed"
            say(f"{one.node.folder}: {took}" if failed is None else f"{one.node.folder} {how} after {took}: {failed}")
            keys = [key for key in keys if store.state(study.nodes[key]) not in ("done", "failed")]
        if asked() and not stopping:
            stopping, since = True, time.monotonic()
            for one in working:
                one.process.send_signal(signal.SIGTERM)
            if working:
                say(f"stopping: {len(working)} node(s) save and leave")
        if stopping:
            if not working:
                return False
            if time.monotonic() - since > GRACE_S:
                for one in working:
                    one.process.kill()
        while free and not stopping:
            busy = {one.node.key for one in working}
            node = ready(study, store, keys, busy)
            if node is None:
                break
            started = start(node, study, store, free[0], launch)
            if started is None:
                keys = [key for key in keys if store.state(study.nodes[key]) not in ("done", "failed")]
                continue
            say(f"{node.folder} begins, {free[0].name}")
            working.append(started)
            free.pop(0)
        if not working and not stopping:
            return True
        tick()
        time.sleep(LOOK_S)


__all__ = ["EXIT_STOPPED", "Launch", "Running", "end", "ready", "run", "start", "why"]
