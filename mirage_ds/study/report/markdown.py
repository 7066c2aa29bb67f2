"""The report's dict → GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mirage_ds.analysis.controls.report import markdown_table
from mirage_ds.study.report import tables

# What would be markup, unless it is an underscore inside a word, which GitHub leaves alone.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
# What is markup at the beginning of a paragraph.
_START = re.compile(r"^(?=[-+#=])|^(\d+)(?=[.)])")


def escaped(text: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    return _MARKUP.sub(lambda met: f"\\{met[0]}", " ".join(str(text).split()))


def paragraph(text: str) -> str:
    """Write a text as a paragraph of its own."""
    return _START.sub(lambda met: f"{met[1] or ''}\\", escaped(text))


def table(one: tables.Table) -> str:
    """Write a table under its caption."""
    rows = [[escaped(cell) for cell in row] for row in one.rows]
    return f"{paragraph(one.caption)}\n\n{markdown_table([escaped(name) for name in one.head], rows)}"


def markdown(report: Mapping[str, Any], figures: Sequence[tuple[str, str]] = ()) -> str:
    """Write the whole report.

    Args:
        figures: (path beside the Markdown file, caption) of each.
    """
    parts = [f"# {escaped(report['name'])}", paragraph(report["question"]), paragraph(tables.primary_sentence(report))]
    missing = tables.holes(report)
    if missing:
        parts += ["## Holes", "\n".join(f"- {escaped(one)}" for one in missing)]
    parts += ["## Arms", table(tables.arm_table(report)), *map(table, tables.score_tables(report))]
    if figures:
        parts += ["## Figures", *(f"![figure]({path})\n\n{paragraph(caption)}" for path, caption in figures)]
    contrasts = [one for one in (tables.contrast_table(report), tables.primary_levels(report)) if one is not None]
    if contrasts:
        parts += ["## Contrasts", *map(table, contrasts)]
    controls = tables.control_tables(report)
    if controls:
        parts += ["## Controls", *map(table, controls)]
    parts += ["## Cost", table(tables.cost_table(report)), "## How it was made", *map(paragraph, tables.method(report))]
    if report["made"]:
        parts.append("\n".join(f"- {escaped(name)}: {escaped(text)}" for name, text in report["made"].items()))
    return "\n\n".join(part for part in parts if part) + "\n"
