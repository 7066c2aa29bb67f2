"""replies.jsonl: every reply as it came, so that a command that was cut off goes on where it was.

The first line says what was asked (the setup), each further one is a reply or its loss. Lines are only appended, each
by one write; what a kill leaves of a line is dropped at the next start. Of two lines for one job the later counts.
"""

import errno
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

from mirage_ds.chat import Reply
from mirage_ds.curate.rationalize.form import Outcome
from mirage_ds.errors import UserError

NAME = "replies.jsonl"
# A request: the row's place among the file's records, from 0, and which of its samples.
Job = tuple[int, int]


class Journal:
    """The journal of one --out, locked for this process.

    Attributes:
        noted: job → what its line says.
    """

    def __init__(self, out: Path, setup: dict[str, Any]):
        """Open or begin it.

        Args:
            setup: flag → value, all that a reply follows from.

        Raises:
            UserError: it was begun with another setup, another process writes it, or it cannot be written.
        """
        self.path = out / NAME
        self.noted: dict[Job, dict[str, Any]] = {}
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
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            how = "make room, or name another --out"
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); {how}") from None

    def _read(self, setup: dict[str, Any]) -> None:
        """Read the lines there are, or write the first."""
        end, begun = 0, setup
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    values = json.loads(line)
                    if end:
                        row, sample, _ = (values[key] for key in ("row", "sample", "outcome"))
                        self.noted[row, sample] = values
                    else:
                        begun = dict(values["setup"])
                except (ValueError, KeyError, TypeError):
                    how = "remove the line, or name another --out"
                    raise UserError(f"{self.path}, line {number}: no reply; {how}") from None
                end += len(line)
        if begun != setup:
            other = next(key for key in {**begun, **setup} if begun.get(key) != setup.get(key))
            how = "name another folder, or go on with what it was begun with"
            raise UserError(f"--out {self.path.parent}: was begun with another {other}; {how}")
        self.file.truncate(end)
        if not end:
            self._append({"setup": setup})

    def pending(self, job: Job) -> bool:
        """Whether a job has no reply yet; one whose reply was lost is asked again."""
        return job not in self.noted or self.noted[job]["outcome"] == "no reply"

    def note(self, job: Job, line: int, outcome: Outcome, reply: Reply) -> None:
        """Append what came of a job; `line` is that of its row."""
        values: dict[str, Any] = {"row": job[0], "sample": job[1], "line": line, "outcome": outcome}
        if reply.lost:
            values["why"] = reply.text
        else:
            values |= {"text": reply.text, "cut": reply.cut, "served": reply.served}
            values |= {"asked": reply.tokens[0], "written": reply.tokens[1]}
        self._append(values)
        self.noted[job] = values
