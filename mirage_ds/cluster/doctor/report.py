"""What the doctor tells: a table for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirage_ds.cluster.doctor.finding import Finding, Seen

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
MOST_NAMES = 3


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing fails; warnings are for people to judge."""
    return all(finding.status != "fail" for finding in findings)


def _rows(findings: Sequence[Finding], hosts: int) -> list[Finding]:
    """Make one row of hosts that say the same."""
    alike: dict[Finding, list[str]] = {}
    for finding in findings:
        alike.setdefault(finding._replace(host=""), []).append(finding.host)
    rows = []
    for finding, names in alike.items():
        host = ", ".join(names[:MOST_NAMES])
        if len(names) > MOST_NAMES:
            host += f" and {len(names) - MOST_NAMES} more"
        rows.append(finding._replace(host=f"all {hosts}" if len(names) == hosts > 1 else host))
    return rows


def summary(findings: Sequence[Finding], seen: Seen, seconds: float) -> str:
    """Return the last line: how long it took, how many rows of each kind the table has."""
    counts = Counter(row.status for row in _rows(findings, len(seen.hosts)))
    said = ", ".join(f"{counts[status]} {status}" for status in ("fail", "warn", "pass"))
    return f"{len(seen.hosts)} host(s), {sum(host.slots for host in seen.hosts)} slot(s), {seconds:.1f} s: {said}"


def print_table(findings: Sequence[Finding], seen: Seen, seconds: float, console: Console) -> None:
    """Print one row a finding, failures first."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("", "check", "host", "what is seen", "how to mend"):
        table.add_column(title, overflow="fold")
    for row in _rows(findings, len(seen.hosts)):
        # Text, not str: rich would read brackets in a path as markup.
        cells = (Text(cell) for cell in (row.check, row.host, row.says, row.mend))
        table.add_row(Text(row.status, COLOURS[row.status]), *cells)
    console.print(table)
    console.print(summary(findings, seen, seconds), markup=False, highlight=False)


def as_json(findings: Sequence[Finding], seen: Seen, seconds: float) -> str:
    """Return everything as one JSON object: ok, seconds, hosts, findings, bandwidth, facts."""
    bandwidth: dict[str, Any] | None = None
    if seen.bandwidth:
        bandwidth = asdict(seen.bandwidth)
        bandwidth["pairs"] = [[*pair, rate] for pair, rate in seen.bandwidth.pairs.items()]
    return json.dumps(
        {
            "ok": is_healthy(findings),
            "seconds": round(seconds, 2),
            "hosts": [host._asdict() for host in seen.hosts],
            "findings": [finding._asdict() for finding in findings],
            "bandwidth": bandwidth,
            "facts": seen.facts,
        },
        indent=1,
    )
