"""Tables of results, on the console and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Cells = list[str]
# Keys of a report's means that are no metric.
COUNTS = ("count", "low", "high", "runs", "latents")


def score_table(report: Mapping[str, Any], digits: int) -> tuple[Cells, list[Cells]]:
    """Write the scores of a report (evaluate_file) as a head and rows of text, a row a level."""
    first, *others = [name for name in report["all"] if name not in COUNTS]
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
