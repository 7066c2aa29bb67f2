"""`mirage-ds doctor`, the command."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.config.flags import build_model, model_options
from mirage_ds.errors import EXIT_USER_ERROR, UserError, closest


def _run_settings(file: Path) -> dict[str, Any]:
    """Return what a run's YAML says of the things that are looked at here."""
    from mirage_ds.config.run import RunConfig, read_yaml

    values = {str(key).replace("-", "_"): value for key, value in read_yaml(file).items()}
    for name in values:
        if name not in RunConfig.model_fields:
            raise UserError(f"unknown key '{name}' in {file}{closest(name, RunConfig.model_fields)}")
    return {name: value for name, value in values.items() if name in DoctorSpec.model_fields}


@click.command("doctor")
@model_options(DoctorSpec)
@click.option("--config", "yaml_file", type=click.Path(path_type=Path), help="The run's YAML: its paths are taken.")
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object, with all facts, and nothing else.")
def doctor(yaml_file: Path | None, wants_json: bool, **flags: Any) -> None:
    """Look, in seconds, whether these hosts can run the job: what is wrong where, and how to mend it.

    Exit code 0 when all is well or only warned of, 2 when something fails.
    """
    from rich.console import Console

    from mirage_ds.cluster.doctor.checks import CHECKS, run_checks
    from mirage_ds.cluster.doctor.examine import examine
    from mirage_ds.cluster.doctor.report import as_json, is_healthy, print_table

    spec = build_model(DoctorSpec, flags, _run_settings(yaml_file) if yaml_file else None, source=str(yaml_file))
    # `-` and `_` are alike in choices, as everywhere.
    only = [name.replace("_", "-") for name in spec.only]
    for name in only:
        if name not in CHECKS:
            raise UserError(f"--only {name}: no such check{closest(name, CHECKS)}; there are {', '.join(CHECKS)}")
    spec = spec.model_copy(update={"only": only})
    begin = time.monotonic()
    with Console(stderr=True).status("asking the hosts"):
        seen = examine(spec, os.environ)
    findings = run_checks(seen, spec.only)
    seconds = time.monotonic() - begin
    if wants_json:
        click.echo(as_json(findings, seen, seconds))
    else:
        print_table(findings, seen, seconds, Console())
    if not is_healthy(findings):
        sys.exit(EXIT_USER_ERROR)
