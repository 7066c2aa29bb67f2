"""How far the runs at work are, read from their files as they grow: for `ablate run` and `status`. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mirage_ds.cluster.status.facts import read_facts
from mirage_ds.cluster.status.summary import summary
from mirage_ds.run import events
from mirage_ds.study.nodes import Node
from mirage_ds.study.store import Store

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Some lines of log.jsonl, whose whole is not read every other second.
TAIL_BYTES = 1 << 14


class Reached(NamedTuple):
    """The last optimizer step that a run has logged, and how many it will have; None while it has not said."""

    step: int
    steps: int | None


def reached(node: Node, store: Store) -> Reached:
    """Say how far a node is; an evaluation says nothing of itself while it works."""
    run = store.model(node) / "run"
    try:
        return Reached(_last_step(run / "log.jsonl"), _steps(run / "run.json"))
    except OSError:
        # Not there yet, or taken away by a run that begins anew: who only looks must not end the study by it.
        return Reached(0, None)


def _last_step(log: Path) -> int:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        # The first line may have lost its beginning, the last one be half written.
        for line in reversed(file.read().split(b"\n")):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
    return 0


def _steps(start: Path) -> int | None:
    # Written at once and whole (files.write_atomically).
    steps = json.loads(start.read_text()).get("steps")
    return None if steps is None else int(steps)


def glance(node: Node, store: Store, now: float) -> dict[str, Any] | None:
    """Sum a training run up as `mirage-ds status` does; None for an evaluation, or before it has written anything."""
    model = store.model(node)
    if not (model / "run" / events.FILE).is_file():
        return None
    return {**summary(read_facts(model), now), "run": str(store.place(node))}


class Bars:
    """One bar a run at work, below the study's own."""

    def __init__(self, bars: Progress, store: Store):
        self._bars, self._store = bars, store
        self._tasks: dict[str, TaskID] = {}

    def show(self, nodes: Iterable[Node]) -> None:
        """Bring the bars to where these nodes are, and take away those of others."""
        working = {node.key: node for node in nodes}
        for key in [key for key in self._tasks if key not in working]:
            self._bars.remove_task(self._tasks.pop(key))
        for key, node in working.items():
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(f"  {node.folder}", total=None)
            at = reached(node, self._store)
            self._bars.update(self._tasks[key], completed=at.step, total=at.steps)
