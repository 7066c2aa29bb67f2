"""Stopping on request: a signal or a file asks, the work ends at its next edge, the exit code says so.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) only leave a mark. Whoever loops looks at it: the training loop at each step edge,
where all ranks agree, save and leave together. A second Ctrl-C ends the process at once.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

from mirage_ds.errors import EXIT_STOPPED, STOP_SIGNALS, Stopped

# How often a stop file is looked for: on a network file system a look costs a round trip.
LOOK_EVERY_S = 1.0


def leave_on_signals() -> None:
    """End this process on the signals with one line, until a StopRequest listens: nothing is begun, nothing is lost.

    Imports take seconds, and an exception among them would be a traceback.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped\n")
    os._exit(EXIT_STOPPED)


class StopRequest:
    """Whether somebody has asked this process to stop.

    Args:
        file: a stop file: once it is there, the process is asked to stop; what an earlier process was stopped by does
            not count. None for signals alone.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.left_over = self._written()
        self.reason: str | None = None
        self.looked = float("-inf")

    def listen(self, at_once: bool = False) -> None:
        """Take over the signals. Call it in the main thread.

        Args:
            at_once: a signal raises Stopped where the work stands, for commands of a single process whose output is
                whole or not there.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise if at_once else self._mark)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        del frame
        # One is enough: what is cleaned up now is not to be stopped in its turn.
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def _written(self) -> int | None:
        try:
            return self.file.stat().st_mtime_ns if self.file else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def asked(self) -> bool:
        """Look at the mark and, now and then, for the stop file."""
        if self.reason is None and self.file and time.monotonic() - self.looked >= LOOK_EVERY_S:
            self.looked = time.monotonic()
            if self._written() not in (None, self.left_over):
                self.reason = f"stop file {self.file}"
        return self.reason is not None
