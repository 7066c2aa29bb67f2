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
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.curate.rationalize.form import Outcome, Reply
from mirage_ds.errors import UserError

NAME = "replies.jsonl"
# A request: the row's place among the file's records, from 0, and which of its samples.
Job = tuple[int, int]


class Noted(NamedTuple):
    """The bytes of a job's line in the file, and what became of the job."""

    offset: int
    length: int
    outcome: Outcome


class Journal:
    """The journal of one --out, locked for this process. It holds a few numbers a reply in memory, no text.

    Attributes:
        noted: job → its line.
        tokens: asked and written, of all replies, as far as they were told.
    """

    def __init__(self, out: Path, setup: dict[str, Any]):
        """Open or begin it.

        Args:
            setup: flag → value, all that a reply follows from.

        Raises:
            UserError: it was begun with another setup, another process writes it, or it cannot be written.
        """
        self.path = out / NAME
        self.noted: dict[Job, Noted] = {}
        self.tokens: Counter[str] = Counter()
        if (out / "data.jsonl").exists() and not self.path.is_file():
            raise UserError(f"--out {out}: holds a data.jsonl that is not of this command; name another folder")
        out.mkdir(parents=True, exist_ok=True)
        self.file: io.FileIO = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(setup)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"--out {out}: another process writes {NAME} there; wait for it, or stop it") from None
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        """Let others have it."""
        self.file.close()

    def _append(self, values: dict[str, Any]) -> None:
        # ASCII: a reply may hold half a surrogate pair, which only an escape can spell.
        line = (json.dumps(values) + "\n").encode()
        offset = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            how = "make room, or name another --out"
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); {how}") from None
        self._take(values, offset, len(line))

    def _take(self, values: dict[str, Any], offset: int, length: int) -> None:
        """Remember a line; KeyError, TypeError or ValueError where it is none."""
        if offset:
            self.noted[int(values["row"]), int(values["sample"])] = Noted(offset, length, values["outcome"])
            self.tokens.update({name: int(values.get(name, 0)) for name in ("asked", "written")})

    def _read(self, setup: dict[str, Any]) -> None:
        """Read the lines there are, or write the first."""
        end, begun = 0, setup
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    values = json.loads(line)
                    begun = begun if end else dict(values["setup"])
                    self._take(values, end, len(line))
                except (ValueError, KeyError, TypeError):
                    how = "remove the line, or name another --out"
                    raise UserError(f"{self.path}, line {number}: no reply; {how}") from None
                end += len(line)
        if begun != setup:
            other = next(key for key in {**begun, **setup} if begun.get(key) != setup.get(key))
            raise UserError(
                f"--out {self.path.parent}: was begun with another {other}; name another folder, or go on with what it "
                "was begun with"
            )
        self.file.truncate(end)
        if not end:
            self._append({"setup": setup})

    def pending(self, job: Job) -> bool:
        """Whether a job has no reply yet; one whose reply was lost is asked again."""
        return job not in self.noted or self.noted[job].outcome == "no reply"

    def note(self, job: Job, line: int, outcome: Outcome, reply: Reply) -> None:
        """Append what came of a job; `line` is that of its row."""
        values: dict[str, Any] = {"row": job[0], "sample": job[1], "line": line, "outcome": outcome}
        if reply.lost:
            values["why"] = reply.text
        else:
            values |= {"text": reply.text, "cut": reply.cut, "served": reply.served}
            values |= {"asked": reply.tokens[0], "written": reply.tokens[1]}
        self._append(values)

    def line(self, job: Job) -> dict[str, Any]:
        """Read again what a job's line says."""
        offset, length, _ = self.noted[job]
        values: dict[str, Any] = json.loads(os.pread(self.file.fileno(), length, offset))
        return values
