"""What a build tells its user: the counts of what it has made."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


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
        notes: further lines, what and how many.
    """

    task: str
    file: Path
    records: int = 0
    images: int = 0
    levels: Counter[int | str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    duplicates_kept: bool = False
    excluded: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def note(self, what: str, count: int = 1) -> None:
        """Count something that only this task knows; 0 puts the line into the table all the same."""
        self.notes[what] += count


def print_report(report: BuildReport) -> None:
    """Print the counts as a table on stdout."""
    counts: list[tuple[str, int]] = [("records", report.records), ("images written", report.images)]
    levels = sorted(report.levels.items(), key=lambda item: str(item[0]))
    counts += [(f"level {level}", count) for level, count in levels]
    classes = sorted(report.classes.items(), key=lambda item: (len(item[0]), item[0]))
    counts += [(f"answer {kind}", count) for kind, count in classes]
    twice = f"duplicates {'kept' if report.duplicates_kept else 'removed'}"
    counts += [(twice, report.duplicates), ("excluded", report.excluded), *report.notes.items()]
    print_counts(f"{report.task}: {report.file}", counts)


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
