"""What a build tells its user: progress while it runs, counts at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# (done, total), the total None where nobody knows it yet
Advance = Callable[[int, int | None], None]


@dataclass
class BuildReport:
    """The counts of a build or a conversion.

    Attributes:
        file: the JSONL file written.
        records: its rows.
        images: pictures written; those that records share are written once.
        levels: rows per `level`: the side of a board, the kind of a question.
        classes: rows per class of the answer.
        duplicates: repeated rows met (random boards: draws; the same map, or for reasoning the same map and plan).
        duplicates_kept: whether they stand in the file all the same.
        excluded: rows (random boards: draws) left out because a setting says so.
        replaced: answers or plans of the given rows that were wrong, and were replaced.
        notes: further lines, what and how many.
    """

    task: str
    file: Path
    records: int = 0
    images: int = 0
    levels: dict[int | str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    duplicates_kept: bool = False
    excluded: int = 0
    replaced: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, what: str, count: int = 1) -> None:
        """Count something that only this task knows; 0 puts the line into the table all the same."""
        self.notes[what] = self.notes.get(what, 0) + count


def print_report(report: BuildReport) -> None:
    """Print the counts as a table on stdout."""
    counts: list[tuple[str, int]] = [("records", report.records), ("images written", report.images)]
    levels = sorted(report.levels.items(), key=lambda item: str(item[0]))
    counts += [(f"level {level}", count) for level, count in levels]
    classes = sorted(report.classes.items(), key=lambda item: (len(item[0]), item[0]))
    counts += [(f"answer {kind}", count) for kind, count in classes]
    counts += [(f"duplicates {'kept' if report.duplicates_kept else 'removed'}", report.duplicates)]
    counts += [("excluded", report.excluded)]
    if report.replaced:
        counts += [("wrong answers replaced", report.replaced)]
    print_counts(f"{report.task}: {report.file}", [*counts, *report.notes.items()])


def print_counts(title: str, counts: Iterable[tuple[str, int | str]]) -> None:
    """Print a title, if there is one, and a table of counts on stdout."""
    console = Console()
    if title:
        console.print(title, soft_wrap=True, highlight=False, markup=False)
    table = Table("what")
    table.add_column("count", justify="right")
    for what, count in counts:
        table.add_row(what, str(count))
    console.print(table)


@contextmanager
def progress_bar(title: str, after_s: float = 3.0) -> Iterator[Advance]:
    """Yield a function (done, total) that draws a bar on stderr once `after_s` seconds have passed.

    Without a terminal on stderr nothing is ever drawn.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    row = bar.add_task(title, total=None)
    begin = time.monotonic()

    def advance(done: int, total: int | None) -> None:
        if not bar.live.is_started and console.is_terminal and time.monotonic() - begin >= after_s:
            bar.start()
        bar.update(row, completed=done, total=total)

    try:
        yield advance
    finally:
        if bar.live.is_started:  # stopping a bar that never started would print an empty line
            bar.stop()
