"""events.jsonl of a run: what began or ended, and when. Imports no torch."""

import json
import time
from pathlib import Path

FILE = "events.jsonl"
# What others look for. A start begins with LOAD_BEGINS, and each of its phases with PHASE and a name.
LOAD_BEGINS, LOAD_ENDS, PHASE = "load begins", "load ends", "phase: "
SAVE_BEGINS, SAVE_ENDS, SAVE_FAILED = "save begins", "save ends", "save failed"
# With --async_save: from here on its files are written while steps are taken.
SAVE_GOES_ON = "save goes on"
# And from here on no step is taken until it ends.
SAVE_WAITS = "save is waited for"
EVALUATION_BEGINS, EVALUATION_ENDS = "evaluation begins", "evaluation ends"
ROLLOUT_BEGINS, SCORING_BEGINS, ROLLOUT_ENDS = "rollout begins", "scoring begins", "rollout ends"
MODEL_BEGINS, MODEL_ENDS = "model save begins", "model save ends"
STOPPED, FAILED = "stopped on request", "failed"


def note(own_folder: Path, event: str, step: int | None = None, why: str | None = None, **numbers: float) -> None:
    """Add a line to the run's events.jsonl. Rank 0 calls it.

    Args:
        own_folder: the run's own folder.
        why: a reason, for people.
        numbers: what else is said of it.
    """
    line = {"time": time.time(), "event": event, "step": step, "why": why, **numbers}
    with (own_folder / FILE).open("a") as file:
        file.write(json.dumps({key: said for key, said in line.items() if said is not None}, ensure_ascii=False) + "\n")
