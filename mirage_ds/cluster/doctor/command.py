"""`mirage-ds doctor`, the command. Imports little, so that `--help` is quick."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.config.flags import build_model, model_options, read_yaml
from mirage_ds.config.names import hint
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import EXIT_USER_ERROR, UserError, closest


def _run_settings(file: Path) -> dict[str, Any]:
    """Return what a run's YAML says of the things that are looked at here."""
    values = {str(key).replace("-", "_"): value for key, value in read_yaml(file).items()}
    for name in values:
        if name not in RunConfig.model_fields:
            raise UserError(f"unknown key '{name}' in {file}{hint(name, RunConfig.model_fields)}")
    return {name: value for name, value in values.items() if name in DoctorSpec.model_fields}


@click.command("doctor")
@model_options(DoctorSpec)
@click.option("--config", "yaml_file", type=click.Path(path_type=Path), help="The run's YAML: gives the flags above.")
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object, with all facts, and nothing else.")
def doctor(yaml_file: Path | None, wants_json: bool, **flags: Any) -> None:
    """Check hosts, software, model and data before a run.

    It takes seconds, and says what is wrong, on which host, and how to fix it. Exit code 0 when nothing fails (warnings
    may remain), 2 when something does.
    """
    from rich.console import Console

    from mirage_ds.cluster.doctor.checks import CHECKS, run_checks
    from mirage_ds.cluster.doctor.examine import examine
    from mirage_ds.cluster.doctor.report import as_json, print_table

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
