"""`mirage-ds doctor`: the command, and how it shows what was found. Imports little, so that `--help` is quick."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.config.flags import build_model, model_options
from mirage_ds.config.names import hint
from mirage_ds.config.run import RunConfig, read_yaml
from mirage_ds.errors import EXIT_USER_ERROR, UserError, closest

if TYPE_CHECKING:
    from rich.console import Console

    from mirage_ds.cluster.doctor.finding import Finding, Seen

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
MOST_NAMES = 3


def _run_settings(file: Path) -> dict[str, Any]:
    """Return what a run's YAML says of the things that are looked at here."""
    values = {str(key).replace("-", "_"): value for key, value in read_yaml(file).items()}
    for name in values:
        if name not in RunConfig.model_fields:
            raise UserError(f"unknown key '{name}' in {file}{hint(name, RunConfig.model_fields)}")
    return {name: value for name, value in values.items() if name in DoctorSpec.model_fields}


@click.command("doctor")
@model_options(DoctorSpec)
@click.option("--config", "yaml_file", type=click.Path(path_type=Path), help="The run's YAML: its paths are taken.")
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object, with all facts, and nothing else.")
def doctor(yaml_file: Path | None, wants_json: bool, **flags: Any) -> None:
    """Check hosts, software, model and data before a run.

    It takes seconds, and says what is wrong, on which host, and how to fix it. Exit code 0 when nothing fails (warnings
    may remain), 2 when something does.
    """
    from rich.console import Console

    from mirage_ds.cluster.doctor.checks import CHECKS, run_checks
    from mirage_ds.cluster.doctor.examine import examine

    # `-` and `_` are alike in choices, as everywhere.
    flags["only"] = tuple(name.replace("_", "-") for name in flags["only"])
    spec = build_model(DoctorSpec, flags, _run_settings(yaml_file) if yaml_file else None, source=str(yaml_file))
    for name in spec.only:
        if name not in CHECKS:
            raise UserError(f"--only {name}: no such check{closest(name, CHECKS)}; there are {', '.join(CHECKS)}")
    begin = time.monotonic()
    with Console(stderr=True).status("asking the hosts"):
        seen = examine(spec, os.environ)
    findings = run_checks(seen)
    seconds = time.monotonic() - begin
    if wants_json:
        click.echo(as_json(findings, seen, seconds))
    else:
        print_table(findings, seen, seconds, Console())
    if any(finding.status == "fail" for finding in findings):
        sys.exit(EXIT_USER_ERROR)


def print_table(findings: Sequence[Finding], seen: Seen, seconds: float, console: Console) -> None:
    """Print a row for all hosts that say the same, failures first; then how long it took and the number of rows."""
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

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
