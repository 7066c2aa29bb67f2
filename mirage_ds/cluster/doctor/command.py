"""`mirage-ds doctor`: its flags and the command. Imports little, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from mirage_ds.config.flags import build_model, model_options
from mirage_ds.errors import EXIT_USER_ERROR, UserError, closest


class DoctorSpec(BaseModel):
    """What is looked at. The run's own flags keep their names and meaning; all are optional."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    hostfile: Path | None = Field(None, description="The hostfile of `deepspeed --hostfile`; hosts are asked over ssh.")
    slurm: bool = Field(False, description="Look at the nodes of the Slurm job that this is called in.")
    model: str | None = Field(None, description="The run's model folder or hub id.")
    load_model_path: Path | None = Field(None, description="The run's start weights.")
    data_path: Path | tuple[Path, ...] | None = Field(None, description="The run's records, all of them.")
    eval_data_path: Path | None = Field(None, description="The records whose loss the run measures.")
    image_root: Path | None = Field(None, description="Second place where relative image paths are looked for.")
    save_model_path: Path | None = Field(None, description="The run folder: shared, free space, write speed.")
    cache_dir: Path | None = Field(None, description="The run's cache of hub downloads.")
    deepspeed: Path | None = Field(None, description="The run's DeepSpeed JSON.")
    keep_checkpoints: PositiveInt = Field(2, description="Sharded checkpoints that stay on the disk.")
    master_port: PositiveInt = Field(29500, le=65535, description="Port of rank 0, as given to the launcher.")
    master_addr: str | None = Field(None, description="Address of rank 0. [default: what DeepSpeed would take]")
    bandwidth: bool = Field(True, description="Start a rank on every slot and measure between them.")
    timeout_s: PositiveFloat = Field(12, description="Seconds a host has to answer; bandwidth has its own minutes.")
    only: list[str] = Field([], description="Run these checks alone, by the names of the table.")

    def wants(self, check: str) -> bool:
        """Whether a check is to be run."""
        return not self.only or check in self.only

    def models(self) -> dict[str, str]:
        """Return flag → model folder or hub id; the one that gives the weights first."""
        named = {"--load_model_path": self.load_model_path, "--model": self.model}
        return {flag: str(name) for flag, name in named.items() if name is not None}

    def files(self) -> dict[str, Path]:
        """Return flag → file that every host reads."""
        from mirage_ds.config.mixture import parse_part

        files = {"--eval_data_path": self.eval_data_path, "--deepspeed": self.deepspeed}
        if isinstance(self.data_path, tuple) and len(self.data_path) > 1:
            # Weights are the training's business.
            parts = enumerate(self.data_path, 1)
            files |= {f"--data_path {number}": parse_part(str(part)).file for number, part in parts}
        elif self.data_path:
            files["--data_path"] = self.data_path[0] if isinstance(self.data_path, tuple) else self.data_path
        return {flag: path for flag, path in files.items() if path is not None}


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
    """Check in seconds whether these hosts can run the job: what is wrong, on which host, and how to fix it.

    Exit code 0 when nothing fails (warnings may remain), 2 when something does.
    """
    from rich.console import Console

    from mirage_ds.cluster.doctor.checks import CHECKS, run_checks
    from mirage_ds.cluster.doctor.examine import examine
    from mirage_ds.cluster.doctor.report import as_json, print_table

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
    findings = run_checks(seen)
    seconds = time.monotonic() - begin
    if wants_json:
        click.echo(as_json(findings, seen, seconds))
    else:
        print_table(findings, seen, seconds, Console())
    if any(finding.status == "fail" for finding in findings):
        sys.exit(EXIT_USER_ERROR)
