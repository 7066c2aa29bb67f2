"""What a run writes: checkpoints on the way, the trained model at the end, the best model so far.

<save_model_path>/                  the trained model
<save_model_path>/run/checkpoints/  one folder a checkpoint
<save_model_path>/best/             with --save_best, the model of the best evaluation: a model folder like any
                                    other, and best.json: metric, step and all that was measured
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from mirage_ds.engine.checkpoint import CheckpointWriter
from mirage_ds.engine.setup import World, at_rank_zero, from_rank_zero, trouble_of
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import better
from mirage_ds.files import delete_model, move_others, write_atomically
from mirage_ds.run import events
from mirage_ds.run.heartbeat import SAVING
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Learner

NOTE = "best.json"

# (folder, step, scores): writes the model as it is now; all ranks call it.
Save = Callable[[Path, int, Mapping[str, float]], None]


class Saver:
    """Writes checkpoints and the model; `last` is the newest good checkpoint."""

    def __init__(self, run: Run, learner: Learner):
        self.run, self.learner = run, learner
        self.last = learner.checkpoint.place if learner.checkpoint else None
        self._pending: CheckpointWriter | None = None
        self._beside_steps = False

    def save(self, done: int, owed: bool, at_once: bool) -> None:
        """Write the checkpoint of `done` steps. Where that fails the log says so, and training goes on.

        Args:
            owed: the evaluation of this step is still to be made.
            at_once: before anything else, also with --async_save.
        """
        self.finish()
        config, journal = self.run.config, self.run.journal
        state = {**self.learner.state, "step": done, "evaluation_owed": owed}
        journal.tell(events.SAVE_BEGINS, done)
        self._beside_steps = config.async_save and not at_once
        self._pending = CheckpointWriter(
            self.learner.engine, self.run.folder / "checkpoints", state, self.run.world, self._beside_steps
        )
        if self._beside_steps:
            journal.tell(events.SAVE_GOES_ON, done)
        else:
            self.finish()

    def step_done(self) -> None:
        """Put the checkpoint that is being written in its place, once every rank has written its files."""
        if self._pending and self._pending.written():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is in its place; say what came of it."""
        if self._pending is None:
            return
        writer, self._pending = self._pending, None
        done, journal = writer.state["step"], self.run.journal
        if self._beside_steps:
            journal.tell(events.SAVE_WAITS, done)
        journal.at("finishes a checkpoint", done, SAVING)
        outcome = writer.finish(self.run.config.keep_checkpoints)
        if isinstance(outcome, str):
            journal.tell(events.SAVE_ENDS, done)
            last = self.last or "none"
            line = f"error: no checkpoint of step {done}: {outcome}; the last good one is {last}"
            journal.tell(events.SAVE_FAILED, done, line, outcome)
            return
        self.last, size, own, seconds, held = outcome
        said = f"{size / 1e9:.3g} GB, {own / 1e9:.3g} of this rank, {seconds:.1f} s, {held:.1f} of them without a step"
        ends = f"checkpoint {self.last}: {said}"
        journal.tell(events.SAVE_ENDS, done, ends, bytes=size, rank_bytes=own, seconds=seconds, held_seconds=held)

    def save_model(self, step: int, scores: Mapping[str, float]) -> None:
        """Write the trained model, with what it scores, if known; UserError on the rank that cannot."""
        self.finish()
        self.run.journal.tell(events.MODEL_BEGINS, step)
        folder = self.run.config.save_model_path
        try:
            self.learner.save(self.run.world, folder, step, scores)
        except OSError as error:
            raise UserError(
                f"the model cannot be written ({error}); make room and use --resume auto: the last good checkpoint is "
                f"{self.last or 'none, since --save_every was not given'}",
                everywhere=False,
            ) from None
        what = "learned targets" if self.run.config.stage == "scaffold" else "model"
        self.run.journal.tell(events.MODEL_ENDS, step, f"{what} saved to {folder}")


class Best:
    """Keeps the best model of a run. `best` is written beside and renamed: it is the old one or the new one, whole.

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

    def _write(self, step: int, metrics: Mapping[str, float]) -> str | None:
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

        trouble = at_rank_zero(begin, self.world)
        if trouble:
            return trouble
        # All ranks do their part, and hear whether rank 0 has failed.
        own = trouble_of(lambda: self.save(beside, step, metrics))
        trouble = from_rank_zero(lambda: own, self.world) or at_rank_zero(finish, self.world)
        if trouble:
            from_rank_zero(lambda: shutil.rmtree(beside, ignore_errors=True), self.world)
        return trouble
