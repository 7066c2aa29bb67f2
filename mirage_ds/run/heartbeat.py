"""What a rank does now, told to the guard that started it; without a guard nobody is told. Imports no torch.

Every rank makes the same marks in the same order: the rank with the fewest is the one that the others wait for.
"""

import faulthandler
import json
import os
import signal
from pathlib import Path
from typing import Any

# Marks are counted from here once the first step is done. A start has fewer.
SETTLED = 1 << 30
# File descriptors that the guard hands to the rank: a pipe to write marks into, a file for the stacks.
MARKS_FD, STACKS_FD = "MIRAGE_GUARD_MARKS", "MIRAGE_GUARD_STACKS"
# On this signal a rank writes the stacks of all its threads, whatever it is doing.
STACKS_SIGNAL = signal.SIGUSR2

# Marks in which a rank does nothing but wait for the others.
COLLECTIVE = "collective"
# Marks that may take as long as a model is large, as everything does that comes before the end of the first step.
LOADING, SAVING = "load", "save"


class Heartbeat:
    """Tells the guard what this rank does next.

    Args:
        pipe: the guard's end of it; None where there is no guard.
    """

    def __init__(self, pipe: int | None = None):
        self._pipe = pipe
        self._count = 0
        self._settled = False

    def at(self, doing: str, step: int | None = None, kind: str = "") -> None:
        """Mark that the rank begins something.

        Args:
            doing: for people, such as "waits for data".
            kind: COLLECTIVE, LOADING or SAVING, where it is one of these.
        """
        self._count += 1
        slow = not self._settled or kind in (LOADING, SAVING)
        self._tell({"count": self._count, "doing": doing, "step": step, "kind": kind, "slow": slow})

    def settle(self) -> None:
        """Say that the first step is done: from now on only loads and saves may take long."""
        self._settled = True
        # From here on the marks of all ranks are as many; in a start each has worked on its own share.
        self._count = SETTLED

    def folder(self, own_folder: Path) -> None:
        """Say where the run keeps its files: the guard writes stacks and verdicts there."""
        self._tell({"folder": str(own_folder.resolve())})

    def _tell(self, message: dict[str, Any]) -> None:
        if self._pipe is None:
            return
        try:
            os.write(self._pipe, json.dumps(message).encode() + b"\n")
        except BlockingIOError:
            # The guard is stopped: the next mark will say it again.
            return
        except BrokenPipeError:
            self._pipe = None


def guarded() -> Heartbeat:
    """Take what the guard has handed over; a Heartbeat that tells nobody where there is no guard."""
    pipe, stacks = os.environ.pop(MARKS_FD, None), os.environ.pop(STACKS_FD, None)
    if pipe is None or stacks is None:
        return Heartbeat()
    for number in (int(pipe), int(stacks)):
        os.set_inheritable(number, False)
    os.set_blocking(int(pipe), False)
    faulthandler.register(STACKS_SIGNAL, file=int(stacks), all_threads=True)
    return Heartbeat(int(pipe))
