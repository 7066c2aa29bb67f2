"""Where the time from a process's start to its first step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import psutil

from mirage_ds.run.events import PHASE, note
from mirage_ds.run.whereabouts import LOADING, Whereabouts


class Begin(Protocol):
    """Is told what begins; `own_folder` is the run's, once it is this run's and if this rank is to write there."""

    def __call__(self, name: str, own_folder: Path | None = None) -> None:
        """Begin a phase."""


class StartUp:
    """Clocks the phases of a start; each ends where the next one begins. The first is that of the imports.

    Attributes:
        folder: the run's own folder, once this rank is to write there.
        moved: is told of each phase that this rank has come on.
    """

    def __init__(self, where: Whereabouts):
        self._where = where
        # By the wall clock: the process is older than this interpreter.
        self._age = time.time() - psutil.Process().create_time()
        self._name, self._begun = "imports", time.perf_counter() - self._age
        self.seconds: dict[str, float] = {}
        self.folder: Path | None = None
        self.moved: Callable[[], None] = nothing

    def begin(self, name: str, own_folder: Path | None = None) -> None:
        """Begin a phase, tell the guard, and note it in the run's folder."""
        self.end()
        self._name = name
        self.folder = own_folder or self.folder
        if self.folder is not None:
            note(self.folder, f"{PHASE}{name}")
        self._where.at(name, kind=LOADING)
        self.moved()

    def end(self) -> None:
        """End the phase that is under way; a phase that comes twice adds up."""
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._begun
        self._begun = now


def nothing() -> None:
    """Be the `moved` or `tick` of work that nobody waits for."""


def quiet(name: str, own_folder: Path | None = None) -> None:
    """Be the `begin` of work that nobody clocks."""
    del name, own_folder


def phases_line(seconds: Mapping[str, float]) -> str:
    """Write the phases as one line of the log."""
    parts = ", ".join(f"{name} {took:.1f}" for name, took in seconds.items())
    return f"first step {sum(seconds.values()):.1f} s after this process began: {parts}"
