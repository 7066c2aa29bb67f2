"""What is asked and what comes back; the records file, read row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mirage_ds.curate.rationalize.form import Judge
from mirage_ds.curate.rewrite import told
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import parse_record
from mirage_ds.data.record_files import need_lines, read_lines
from mirage_ds.errors import UserError

# Whether (row, sample) is still to be asked.
Pending = Callable[[int, int], bool]


class Job(NamedTuple):
    """One request: the row's place in the file (of its records, from 0), and which of its samples.

    Attributes:
        judge: of the row's record.
    """

    row: int
    sample: int
    judge: Judge


class Reply(NamedTuple):
    """What a model wrote.

    Attributes:
        cut: it ended because it had all its tokens.
        served: the model that the server says has written it; "" if it says none.
        tokens: of the request and of the reply, where they are told.
    """

    text: str
    cut: bool = False
    served: str = ""
    tokens: tuple[int, int] = (0, 0)


class Lost(NamedTuple):
    """No reply, and why.

    Attributes:
        server: whether the server failed; else it refused this job alone.
    """

    why: str
    server: bool = True


@dataclass(frozen=True)
class Rows:
    """The rows of a records file; a single one is in memory at a time.

    Attributes:
        task: --task. most: --most.
    """

    file: Path
    finder: ImageFinder
    task: str | None
    most: int | None

    def __iter__(self) -> Iterator[tuple[int, Judge]]:
        """Yield (place, judge of the record); UserError where a record cannot be used."""
        need_lines(self.file)
        try:
            for row, (line, text) in enumerate(islice(read_lines(self.file), self.most)):
                with told(self.file, line):
                    judge = Judge.of(parse_record(text, line), self.task)
                yield row, judge
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror}); name a readable file") from None

    def check(self) -> int:
        """Look at every record and at the header of each of its images, before anything is asked.

        Returns:
            The number of rows.

        Raises:
            UserError: the first thing that is wrong.
        """
        count = 0
        for _, judge in self:
            count += 1
            with told(self.file, judge.record.line):
                for name, path in judge.record.images(helpers=True):
                    self.finder.size(judge.record, name, path)
        if not count:
            raise UserError(f"{self.file}: holds no record; expected one JSON object a line")
        return count
