"""replies.jsonl: every reply as it came, so that a command that was cut off goes on where it was.

The first line says what was asked (the setup), each further one is a reply or its loss. Lines are only appended, each
by one write; what a kill leaves of a line is dropped at the next start. Of two lines for one job the later counts.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.curate.rationalize.form import Outcome
from mirage_ds.curate.rationalize.job import Job, Lost, Reply
from mirage_ds.errors import UserError

NAME = "replies.jsonl"


class Noted(NamedTuple):
    """Where a job's line stands, and what became of the job."""

    offset: int
    outcome: Outcome


class Journal:
    """The journal of one --out, locked for this process. It holds two numbers a reply in memory, no text.

    Attributes:
        noted: (row, sample) → its line.
        tokens: of all requests and of all replies, as far as they were told.
    """

    def __init__(self, out: Path, setup: dict[str, Any]):
        """Open or begin it.

        Args:
            setup: flag → value, all that a reply follows from.

        Raises:
            UserError: it was begun with another setup, another process writes it, or it cannot be written.
        """
        self.path = out / NAME
        self.noted: dict[tuple[int, int], Noted] = {}
        self.tokens: Counter[str] = Counter()
        with self._writing():
            begun = self.path.is_file()
            if not begun and (out / "data.jsonl").exists():
                raise UserError(f"--out {out}: holds a data.jsonl that is not of this command; name another folder")
            out.mkdir(parents=True, exist_ok=True)
            self.file: io.FileIO = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"--out {out}: another process writes {NAME} there; wait for it, or stop it") from None
        try:
            self._read(setup)
            # Only now: it has never seen what was cut off.
            self.lines = self.path.open("rb")
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        """Let others have it."""
        self.lines.close()
        self.file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room, or name another --out"
            ) from None

    def _append(self, values: dict[str, Any]) -> int:
        """Write a line; return where it begins."""
        # ASCII: a reply may hold half a surrogate pair, which only an escape can spell.
        line = (json.dumps(values) + "\n").encode()
        with self._writing():
            offset = self.file.seek(0, os.SEEK_END)
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return offset

    def _read(self, setup: dict[str, Any]) -> None:
        """Read the lines there are, or write the first."""
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                self._take(line, number, end, setup)
                end += len(line)
        with self._writing():
            self.file.truncate(end)
        if not end:
            self._append({"setup": setup})

    def _take(self, line: bytes, number: int, offset: int, setup: dict[str, Any]) -> None:
        try:
            values = json.loads(line)
            if number == 1:
                before = dict(values["setup"])
            else:
                key, outcome = (int(values["row"]), int(values["sample"])), values["outcome"]
                self._count(values)
                self.noted[key] = Noted(offset, outcome)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}, line {number}: no reply; remove the line, or name another --out") from None
        if number == 1 and before != setup:
            other = next(key for key in {**before, **setup} if before.get(key) != setup.get(key))
            raise UserError(
                f"--out {self.path.parent}: was begun with another {other}; name another folder, or go on with what it "
                "was begun with"
            )

    def _count(self, values: dict[str, Any]) -> None:
        self.tokens.update({"asked": int(values.get("asked", 0)), "written": int(values.get("written", 0))})

    def pending(self, row: int, sample: int) -> bool:
        """Whether a job has no reply yet; one whose reply was lost is asked again."""
        noted = self.noted.get((row, sample))
        return noted is None or noted.outcome == "no reply"

    def note(self, job: Job, found: Reply | Lost) -> Outcome:
        """Append what came of a job; return how it is judged."""
        values: dict[str, Any] = {"row": job.row, "sample": job.sample, "line": job.judge.record.line}
        outcome: Outcome
        if isinstance(found, Lost):
            outcome = "no reply" if found.server else "refused"
            values |= {"outcome": outcome, "why": found.why}
        else:
            outcome = job.judge.outcome(found.text, found.cut)
            values |= {"outcome": outcome, "text": found.text, "cut": found.cut, "served": found.served}
            values |= {"asked": found.tokens[0], "written": found.tokens[1]}
        self.noted[job.row, job.sample] = Noted(self._append(values), outcome)
        self._count(values)
        return outcome

    def line(self, row: int, sample: int) -> dict[str, Any]:
        """Read again what a job's line says."""
        self.lines.seek(self.noted[row, sample].offset)
        values: dict[str, Any] = json.loads(self.lines.readline())
        return values
