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


def print_table(findings: Sequence[Finding], seen: Seen, seconds: float, console: Console) -> None:
    """Print one row a finding, failures first; then how long it took and how many rows of each kind there are."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("", "check", "host", "what is seen", "how to fix it"):
        table.add_column(title, overflow="fold")
    rows = _rows(findings, len(seen.hosts))
    for row in rows:
        # Text, not str: rich would read brackets in a path as markup.
        cells = (Text(cell) for cell in (row.check, row.host, row.says, row.mend))
        table.add_row(Text(row.status, COLOURS[row.status]), *cells)
    console.print(table)
    counts = Counter(row.status for row in rows)
    said = ", ".join(f"{counts[status]} {status}" for status in ("fail", "warn", "pass"))
    slots = sum(host.slots for host in seen.hosts)
    last = f"{len(seen.hosts)} host(s), {slots} slot(s), {seconds:.1f} s: {said}"
    console.print(last, markup=False, highlight=False)


def as_json(findings: Sequence[Finding], seen: Seen, seconds: float) -> str:
    """Return everything as one JSON object: ok, seconds, hosts, findings, bandwidth, facts."""
    bandwidth: dict[str, Any] | None = None
    if seen.bandwidth:
        bandwidth = asdict(seen.bandwidth)
        bandwidth["pairs"] = [[*pair, rate] for pair, rate in seen.bandwidth.pairs.items()]
    return json.dumps(
        {
            "ok": all(finding.status != "fail" for finding in findings),
            "seconds": round(seconds, 2),
            "hosts": [host._asdict() for host in seen.hosts],
            "findings": [finding._asdict() for finding in findings],
            "bandwidth": bandwidth,
            "facts": seen.facts,
        },
        indent=1,
    )
