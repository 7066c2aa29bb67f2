"""What was found, as a table for people and as one JSON object for programs."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mirage_ds.cluster.doctor.finding import Finding, Seen

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
MOST_NAMES = 3


def print_table(findings: Sequence[Finding], seen: Seen, seconds: float, console: Console) -> None:
    """Print a row for all hosts that say the same, failures first; then how long it took and the number of rows."""
    alike: dict[Finding, list[str]] = {}
    for finding in findings:
        alike.setdefault(finding._replace(host=""), []).append(finding.host)
    columns = [Column(title, overflow="fold") for title in ("", "check", "host", "what is seen", "how to fix it")]
    table = Table(*columns, box=box.SIMPLE, pad_edge=False)
    for row, names in alike.items():
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        host = f"all {len(names)}" if len(names) == len(seen.hosts) > 1 else ", ".join(names[:MOST_NAMES]) + more
        # Text, not str: rich would read brackets in a path as markup.
        table.add_row(Text(row.status, COLOURS[row.status]), *map(Text, (row.check, host, row.says, row.mend)))
    console.print(table)
    counts = Counter(row.status for row in alike)
    said = ", ".join(f"{counts[status]} {status}" for status in ("fail", "warn", "pass"))
    slots = sum(host.slots for host in seen.hosts)
    last = f"{len(seen.hosts)} host(s), {slots} slot(s), {seconds:.1f} s: {said}"
    console.print(last, markup=False, highlight=False)


def as_json(findings: Sequence[Finding], seen: Seen, seconds: float) -> str:
    """Return everything as one JSON object: ok, seconds, hosts, findings, bandwidth, facts."""
    found = {
        "ok": all(finding.status != "fail" for finding in findings),
        "seconds": round(seconds, 2),
        "hosts": [host._asdict() for host in seen.hosts],
        "findings": [finding._asdict() for finding in findings],
        "bandwidth": seen.bandwidth and asdict(seen.bandwidth),
        "facts": seen.facts,
    }
    return json.dumps(found, indent=1)
