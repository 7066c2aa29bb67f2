"""The report's dict and its figures → one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mirage_ds.analysis.inspect.page import Section, Shown, facts, paragraph
from mirage_ds.analysis.inspect.page import page as whole_page
from mirage_ds.study.report import tables


def table(one: tables.Table) -> str:
    """Write a table under its caption; what is too wide for the page can be scrolled."""
    head = "".join(f"<th>{escape(name)}</th>" for name in one.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in one.rows)
    caption = f'<p class="quiet">{escape(one.caption)}</p>'
    return f'{caption}<div style="overflow-x: auto"><table><tr>{head}</tr>{rows}</table></div>'


def page(report: Mapping[str, Any], figures: Sequence[tuple[bytes, str]] = ()) -> str:
    """Write the whole report.

    Args:
        figures: (PNG, caption) of each.
    """
    introduction = paragraph(report["question"])
    introduction += f"<p><strong>{escape(tables.primary_sentence(report))}</strong></p>"
    missing = tables.holes(report)
    if missing:
        introduction += "<h2>Holes</h2><ul>" + "".join(f"<li>{escape(one)}</li>" for one in missing) + "</ul>"
    arms = "".join(map(table, [tables.arm_table(report), *tables.score_tables(report)]))
    sections = [Section("Arms", arms, [])]
    if figures:
        sections.append(Section("Figures", "", [Shown(data, caption, caption) for data, caption in figures]))
    contrasts = [one for one in (tables.contrast_table(report), tables.primary_levels(report)) if one is not None]
    if contrasts:
        sections.append(Section("Contrasts", "".join(map(table, contrasts)), []))
    controls = tables.control_tables(report)
    if controls:
        sections.append(Section("Controls", "".join(map(table, controls)), []))
    sections.append(Section("Cost", table(tables.cost_table(report)), []))
    made = "".join(map(paragraph, tables.method(report)))
    made += facts([(name, str(text)) for name, text in report["made"].items()]) if report["made"] else ""
    sections.append(Section("How it was made", made, []))
    return whole_page(report["name"], introduction, sections)
