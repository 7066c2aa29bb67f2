"""Running a study: every node once, those that are ready side by side, until nothing is left that can run.

A node is ready when the node whose model it needs is done. One that fails is tried as often as the study says; what
hangs on it stays undone, and everything else goes on. A stop is passed on to the nodes, which save where they can, and
the next start continues there. A node's process has its lock too: where this one is killed and the node lives on, the
next start leaves it alone and takes what it leaves. Imports no torch.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from mirage_ds.errors import EXIT_STOPPED, UserError, reason
from mirage_ds.study.launch import Place, command, environment
from mirage_ds.study.nodes import Node, Study
from mirage_ds.study.store import Store

LOOK_S = 0.1
# Other processes' nodes are looked at as often.
OTHERS_S = 2.0
# What a stopped node may take to save.
GRACE_S = 600.0

Say = Callable[[str], None]
Look = Callable[[list[Node]], None]


class Running(NamedTuple):
    """A node at work."""

    node: Node
    place: Place
    process: subprocess.Popen[bytes]
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


class Runner:
    """What runs, what is free, what is left.

    Args:
        places: where nodes run, one at a time in each.
        say: is told when a node begins and ends.
        keys: of what is wanted; all nodes if None.
    """

    def __init__(
        self, study: Study, store: Store, places: Sequence[Place], say: Say, keys: Iterable[str] | None = None
    ):
        self.study, self.store, self.say = study, store, say
        self.keys = list(study.nodes if keys is None else keys)
        self.free, self.working = list(places), list[Running]()
        self.stopping_since: float | None = None

    def run(
        self, asked: Callable[[], bool] = lambda: False, patient: bool = True, look: Look = lambda nodes: None
    ) -> bool:
        """Run what is not done. However it leaves, no node goes on without it, unless this process itself is killed.

        Args:
            asked: whether somebody wants this process to stop.
            patient: wait for wanted nodes that other processes work at.
            look: is told every other second which nodes are at work here.

        Returns:
            False where it was stopped.

        Raises:
            UserError: the study's folder cannot be written to.
        """
        try:
            return self._until_done(asked, patient, look)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.store.root}: {reason(error)}; its runs were stopped; the same command goes on"
            ) from None
        finally:
            self._end_all()

    def _until_done(self, asked: Callable[[], bool], patient: bool, look: Look) -> bool:
        look_at, told = 0.0, False
        while True:
            if self._collect():
                self._forget_ended()
                look_at = 0.0
            if asked():
                if self.stopping_since is None and self.working:
                    self.say(f"stopping: {len(self.working)} node(s) save and leave")
                self._stop()
                if not self.working:
                    return False
            elif time.monotonic() >= look_at:
                look_at = time.monotonic() + OTHERS_S
                self._begin()
                look([one.node for one in self.working])
                if not self.working:
                    # Those that other processes work at.
                    others = sum(self.store.state(self.study.nodes[key]) == "running" for key in self.keys)
                    if not others or not patient:
                        return True
                    if not told:
                        told = True
                        self.say(f"waiting for {others} run(s) that another process works at")
            time.sleep(LOOK_S)

    def _collect(self) -> bool:
        """Write down the nodes that have ended; whether there were any."""
        ended = [(one, code) for one in self.working if (code := one.process.poll()) is not None]
        for one, code in ended:
            self.working.remove(one)
            self.free.append(one.place)
            with one.held:
                self._write_down(one, code)
        return bool(ended)

    def _write_down(self, one: Running, code: int) -> None:
        took = f"{time.time() - one.begun:.0f} s"
        if code == 0 and self.store.is_whole(one.node):
            self.store.finish(one.node, one.begun)
            self.say(f"{one.node.folder}: {took}")
            return
        # However it ends once it was asked to stop, that is no failure: the request may meet it before it listens.
        stopping = self.stopping_since is not None
        failed = why(self.store.log(one.node), code)
        self.store.ended(one.node, one.begun, EXIT_STOPPED if stopping else code, failed)
        self.say(f"{one.node.folder} {'stopped' if stopping else 'failed'} after {took}: {failed}")

    def _forget_ended(self) -> None:
        """Leave alone what is done or has failed for good."""
        self.keys = [key for key in self.keys if self.store.state(self.study.nodes[key]) not in ("done", "failed")]

    def _begin(self) -> None:
        """Start what can start."""
        while self.free and (node := self._ready()):
            started = self._start(node, self.free[0])
            if started is None:
                self._forget_ended()
                continue
            self.working.append(started)
            self.free.pop(0)
            self.say(f"{node.folder} begins, {started.place.of(node).name}")

    def _ready(self) -> Node | None:
        """Return the first node that can start now."""
        busy = {one.node.key for one in self.working}
        for key in self.keys:
            node = self.study.nodes[key]
            parent = self.study.parent_of(node)
            can_start = parent is None or self.store.is_done(parent)
            if key not in busy and can_start and self.store.state(node) == "waiting":
                return node
        return None

    def _start(self, node: Node, place: Place) -> Running | None:
        """Start a node; None where another process works at it, or it has been done meanwhile."""
        store, parent, used = self.store, self.study.parent_of(node), place.of(node)
        with ExitStack() as held:
            lock = held.enter_context(store.hold(node))
            if lock is None or store.is_done(node):
                return None
            store.prepare(node, parent)
            begun = time.time()
            if store.is_whole(node):
                # Its process ended well and ours did not live to write it down.
                store.finish(node, begun)
                return None
            log = held.enter_context(store.log(node).open("ab"))
            words = command(node, parent, store, used)
            log.write(f"\n$ {' '.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(used, store.place(node), self.study.spec.launch.environment),
                # A Ctrl-C of the terminal reaches this process alone, which passes it on.
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
            return Running(node, place, process, held.pop_all(), begun)

    def _stop(self) -> None:
        """Ask what runs to stop, once; end what does not listen, with all that it started."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            for one in self.working:
                one.process.send_signal(signal.SIGTERM)
        elif time.monotonic() - self.stopping_since > GRACE_S:
            for one in self.working:
                if one.process.poll() is None:
                    os.killpg(one.process.pid, signal.SIGKILL)

    def _end_all(self) -> None:
        """Stop what runs and wait for it, without a word: this process can go on no more."""
        while any(one.process.poll() is None for one in self.working):
            self._stop()
            time.sleep(LOOK_S)
        for one in self.working:
            one.held.close()
