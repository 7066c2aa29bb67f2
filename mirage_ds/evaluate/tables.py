"""Files of scores, and tables of results on the console and in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mirage_ds.errors import UserError, reason, strict_json
from mirage_ds.tasks import NO_METRICS

Cells = list[str]
# What a report has, whatever the task.
KEYS = {"task", "data", "settings", "hashes", "levels", "all", "answers"}
ANSWER_KEYS = {"line", "prompt", "metrics"}


def is_report(value: Any) -> bool:
    """Tell whether a JSON value has what is read of a file of scores."""
    if not isinstance(value, dict) or not value.keys() >= KEYS:
        return False
    hashes, answers = value["hashes"], value["answers"]
    return (
        isinstance(hashes, dict)
        and "data" in hashes
        and isinstance(answers, list)
        and all(isinstance(one, dict) and one.keys() >= ANSWER_KEYS for one in answers)
        and all(isinstance(one["metrics"], dict) for one in answers)
        and all(isinstance(number, (int, float)) for one in answers for number in one["metrics"].values())
    )


def read_report(file: Path) -> dict[str, Any]:
    """Read what `mirage-ds evaluate --out` wrote.

    Raises:
        UserError: it is something else.
    """
    try:
        report = strict_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or reason(error)})") from None
    except (ValueError, RecursionError):
        report = None
    if not is_report(report):
        raise UserError(f"{file}: is no file of scores; `mirage-ds evaluate FOLDER … --out {file}` writes one")
    return report


def score_table(report: Mapping[str, Any], digits: int) -> tuple[Cells, list[Cells]]:
    """Write the scores of a report (evaluate_file) as a head and rows of text, a row a level."""
    first, *others = [name for name in report["all"] if name not in NO_METRICS]
    rows = []
    for level, means in [*report["levels"].items(), ("all", report["all"])]:
        low, high, *metrics = (f"{means[name]:.{digits}f}" for name in ("low", "high", first, *others))
        rows.append([level, str(means["count"]), metrics[0], f"{low}–{high}", *metrics[1:], f"{means['latents']:.1f}"])
    return ["level", "rows", first, "95 % interval", *others, "latents an answer"], rows


def print_table(head: Cells, rows: Sequence[Cells], title: str) -> None:
    """Print a table."""
    table = Table(*head, title=title)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def markdown_table(head: Cells, rows: Sequence[Cells]) -> str:
    """Write a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


class Told(NamedTuple):
    """Results for people: tables as (head, rows), and sentences."""

    title: str
    tables: Sequence[tuple[Cells, Sequence[Cells]]]
    notes: Sequence[str] = ()

    def print(self) -> None:
        """Print tables and sentences."""
        for head, rows in self.tables:
            print_table(head, rows, self.title)
        for note in self.notes:
            Console().print(note, highlight=False)

    def markdown(self) -> str:
        """Write them in Markdown."""
        parts = [f"# {self.title}", *(markdown_table(head, rows) for head, rows in self.tables), *self.notes]
        return "\n\n".join(parts) + "\n"
