"""How the ranks of a start wait for each other: outside of collectives, as long as anybody comes on.

A collective has a bound in seconds; a start takes as long as records, downloads and weights are large. So ranks meet
in the store of the process group first and enter a collective together. A rank that ends meanwhile ends the others.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from mirage_ds.errors import EXIT_LOST, UserError

# Signs of life in the store, in seconds: how often they come, after how long without one a rank is taken for dead.
# A thread gives them, and an extension may keep it from running for a while.
BEAT_S = 2.0
SILENCE_S = 60.0
# Where the store is gone this rank may just be about to leave too.
FAREWELL_S = 10.0
STORE = "rank 0, which holds the store of the process group,"
# Of two ranks; more ranks look less often, so that rank 0 is asked as often.
LONGEST_LOOK_S = 0.01
# Progress and requests to stop are told and looked for this often.
TELL_EVERY_S = 1.0


class Waiting:
    """Meets the other ranks, until the first step is done. Its methods are for the main thread.

    Args:
        store: of the process group.
        bound: seconds that a rank waits while no rank comes on.
    """

    def __init__(self, store: Any, rank: int, size: int, bound: float):
        self._store, self.rank, self.size, self.bound = store, rank, size, bound
        self._met = 0
        self._told = self._looked = float("-inf")
        self._stopping = False
        self._over = threading.Event()

    def meet(self) -> None:
        """Wait until every rank has come here.

        Raises:
            UserError: no rank has made progress for `bound` seconds.
        """
        if self._over.is_set() or self.size == 1:
            return
        self._met += 1
        here = f"mirage/met/{self._met}"
        there, moved, since, look = self._add(here, 1), 0, time.monotonic(), 0.001
        while there < self.size:
            time.sleep(look)
            look = min(2 * look, LONGEST_LOOK_S * self.size / 2)
            seen = self._add(here, 0), self._add("mirage/moved", 0)
            if seen != (there, moved):
                (there, moved), since = seen, time.monotonic()
            if time.monotonic() - since > self.bound:
                raise UserError(
                    f"{self.size - there} of {self.size} ranks made no progress for {self.bound:.0f} s, and rank "
                    f"{self.rank} waits for them; see what they are doing, or raise --start_timeout",
                    everywhere=False,
                )

    def moved(self) -> None:
        """Tell the ranks that wait that this one has made progress."""
        now = time.monotonic()
        if self.size > 1 and not self._over.is_set() and now - self._told > TELL_EVERY_S:
            self._told = now
            self._add("mirage/moved", 1)

    def _add(self, name: str, number: int) -> int:
        """Add to a number in the store and return it."""
        try:
            return int(self._store.add(name, number))
        except RuntimeError:
            self._end(STORE)

    def anyone(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Return an `asked` that is also true once another rank was asked to stop."""

        def any_asked() -> bool:
            if self._stopping or self.size == 1 or self._over.is_set():
                return self._stopping or asked()
            now = time.monotonic()
            if asked():
                self._store.set("mirage/stop", "")
                self._stopping = True
            elif now - self._looked > TELL_EVERY_S:
                self._looked = now
                self._stopping = self._store.check(["mirage/stop"])
            return self._stopping

        return any_asked

    def watch(self) -> None:
        """Let a thread give signs of life, and end this process where another rank gives none."""
        if self.size > 1:
            # A client of its own: the main thread may wait in the other one.
            own = self._store.clone()
            own.set_timeout(timedelta(seconds=SILENCE_S))
            threading.Thread(target=self._beat, args=(own,), daemon=True).start()

    def part(self) -> None:
        """Stop waiting and watching, on every rank: all have come so far, and may now end at different times."""
        self._leave("mirage/over", "")

    def fail(self) -> None:
        """Say that this rank ends before its time, so that the others need not wait for its silence."""
        self._leave("mirage/lost", f"rank {self.rank} on {socket.gethostname()}")

    def leave(self) -> None:
        """Be silent from here on: this rank ends, and so do the others, of themselves."""
        self._over.set()

    def _leave(self, name: str, said: str) -> None:
        if self.size > 1 and not self._over.is_set():
            self._over.set()
            # Where the store has gone with rank 0, the others know it by that.
            with suppress(RuntimeError):
                self._store.set(name, said)

    def _beat(self, store: Any) -> None:
        # Each rank looks at the next one: of any number that die, a living one watches at least one.
        watched = (self.rank + 1) % self.size
        beat, heard, since = 0, b"", time.monotonic()
        while not self._over.wait(BEAT_S):
            beat += 1
            try:
                store.set(f"mirage/beat/{self.rank}", str(beat))
                if store.check(["mirage/over"]):
                    return
                if store.check(["mirage/lost"]):
                    self._end(store.get("mirage/lost").decode())
                there = store.check([f"mirage/beat/{watched}"])
                sign = store.get(f"mirage/beat/{watched}") if there else b""
            except RuntimeError:
                if not self._over.wait(FAREWELL_S):
                    self._end(STORE)
                return
            now = time.monotonic()
            if sign != heard or now - since > SILENCE_S + 10 * BEAT_S:
                # Also after this process itself was stopped for a while.
                heard, since = sign, now
            elif now - since > SILENCE_S:
                store.set("mirage/lost", f"rank {watched}")

    def _end(self, who: str) -> NoReturn:
        print(f"error: rank {self.rank} ends too: its peer {who} is gone", file=sys.stderr, flush=True)  # noqa: T201
        # No clean-up: the main thread may be anywhere, and what it writes is whole or not there.
        os._exit(EXIT_LOST)
