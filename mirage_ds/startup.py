"""Where the time from a process's start to its first step goes."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil

from mirage_ds.whereabouts import LOADING, Whereabouts


class StartUp:
    """Clocks the phases of a start; each ends where the next one begins. The first is that of the imports."""

    def __init__(self, where: Whereabouts):
        self._where = where
        # By the wall clock: the process is older than this interpreter.
        self._age = time.time() - psutil.Process().create_time()
        self._name, self._begun = "imports", time.perf_counter() - self._age
        self.seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Begin a phase, and tell the guard."""
        self.end()
        self._name = name
        self._where.at(name, kind=LOADING)

    def end(self) -> None:
        """End the phase that is under way; a phase that comes twice adds up."""
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._begun
        self._begun = now


def quiet(name: str) -> None:
    """Be the `begin` of work that nobody clocks."""
    del name


def phases_line(seconds: Mapping[str, float]) -> str:
    """Write the phases as one line of the log."""
    parts = ", ".join(f"{name} {took:.1f}" for name, took in seconds.items())
    return f"first step {sum(seconds.values()):.1f} s after this process began: {parts}"
