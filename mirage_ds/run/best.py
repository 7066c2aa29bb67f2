"""--save_best: beside the run, the model folder of the best evaluation so far.

    <save_model_path>/best/     a model folder like any other, and best.json: metric, step and all that was measured

Written beside and renamed: `best` is the old one or the new one, whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mirage_ds.engine.setup import World, from_rank_zero
from mirage_ds.evaluate.scoring import better
from mirage_ds.files import delete_model, move_others, write_atomically

NOTE = "best.json"

# (folder, step, scores): writes the model as it is now; all ranks call it.
Save = Callable[[Path, int, Mapping[str, float]], None]


class Best:
    """Keeps the best model of a run.

    Args:
        metric: name of a metric (scoring.MORE_IS_BETTER).
        folder: the run's --save_model_path.
        save: writes a model folder; may raise on rank 0 alone, once all ranks have done their part.
        start: optimizer steps already taken; a run that begins has no best yet.
    """

    def __init__(self, metric: str, folder: Path, save: Save, world: World, start: int):
        self.metric = metric
        self.place = folder / "best"
        self.save = save
        self.world = world
        self.value: float | None = from_rank_zero(lambda: self._known(start), world)

    def _known(self, start: int) -> float | None:
        if start == 0:
            delete_model(self.place)
        note = self.place / NOTE
        if not note.is_file():
            return None
        values = json.loads(note.read_text())
        return float(values["value"]) if values["metric"] == self.metric else None

    def consider(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Keep the model if its metric is better than the best so far. All ranks call it with the same numbers.

        Returns:
            What came of it, as a line for the log; None where it was not better.
        """
        value = metrics[self.metric]
        if not better(self.metric, value, self.value):
            return None
        trouble = self._write(step, metrics)
        if trouble:
            return f"error: step {step} has the best {self.metric} so far, and cannot be kept ({trouble})"
        self.value = value
        return f"best {self.metric} so far, {value:.4f}: kept in {self.place}"

    def _write(self, step: int, metrics: Mapping[str, float]) -> str:
        """Write the folder; return, on every rank, why that failed."""
        beside, old = (self.place.with_name(f".best.{name}") for name in ("partial", "old"))
        note = {"metric": self.metric, "value": metrics[self.metric], "step": step, "metrics": dict(metrics)}

        def begin() -> None:
            for left in (beside, old):
                shutil.rmtree(left, ignore_errors=True)
            beside.mkdir()

        def finish() -> None:
            write_atomically(beside / NOTE, json.dumps(note, indent=1) + "\n")
            if self.place.exists():
                self.place.rename(old)
            beside.rename(self.place)
            move_others(old, self.place)

        def write() -> None:
            self.save(beside, step, metrics)

        trouble = from_rank_zero(lambda: _attempt(begin), self.world)
        if trouble:
            return trouble
        trouble = from_rank_zero_after(write, self.world) or from_rank_zero(lambda: _attempt(finish), self.world)
        if trouble:
            from_rank_zero(lambda: shutil.rmtree(beside, ignore_errors=True), self.world)
        return trouble


def _attempt(work: Callable[[], None]) -> str:
    try:
        work()
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def from_rank_zero_after(work: Callable[[], None], world: World) -> str:
    """Do work on every rank; return, on every rank, why it failed on rank 0."""
    trouble: Any = _attempt(work)
    return from_rank_zero(lambda: trouble, world)
