"""`mirage-ds ablate plan | run | status | report`. Imports stay inside the commands: `--help` is quick."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, Field, PositiveInt, create_model

from mirage_ds.config.extras import need
from mirage_ds.config.flags import CONTEXT, Group, build_model, model_options
from mirage_ds.errors import EXIT_STOPPED
from mirage_ds.files import Output, check_output
from mirage_ds.plan.spec import PlanSpec
from mirage_ds.run.stop import StopRequest

# Something that the study needs has failed; 2 is a user's mistake.
EXIT_HOLES = 1
A_PATH = click.Path(path_type=Path)
as_json = click.option("--json", "wants_json", is_flag=True, help="Print one JSON object and nothing else.")
# What a study's file does not say of its machines and rows, as for `mirage-ds plan`.
_ASKED = ("nodes", "gpus_per_node", "gpu", "gpu_memory", "row_tokens", "images", "image_tokens")
_FIELDS: Any = {name: (PlanSpec.model_fields[name].annotation, PlanSpec.model_fields[name]) for name in _ASKED}
Machine: Any = create_model("Machine", **_FIELDS)


class RunFlags(BaseModel):
    """The flags of `ablate run`."""

    jobs: PositiveInt | None = Field(None, description="How many runs at once. [default: as many as fit]")
    hostfile: Path | None = Field(None, description="Run on these hosts; each run gets --hosts_per_run of them.")
    hosts_per_run: PositiveInt = Field(1, description="Hosts of one run.")
    arms: list[str] | None = Field(None, description="Only these arms.")
    only: list[str] = Field([], description="Only the runs with these keys or folder names.")
    again: bool = Field(False, description="Give failed runs all their tries (`launch.retries`) again.")
    slurm: bool = Field(False, description="Submit to Slurm instead: arrays of runs and of evaluations.")
    sbatch: str | None = Field(None, description="Options of sbatch, in quotes: '--gres gpu:8 --time 8:00:00'.")
    sbatch_evaluate: str | None = Field(None, description="As --sbatch, for evaluations (one GPU). [default: --sbatch]")
    at_once: PositiveInt | None = Field(None, description="How many tasks of a Slurm array may run at once.")


@click.group(cls=Group, context_settings=CONTEXT)
def ablate() -> None:
    """Run, follow and report a study of arms and seeds.

    One file describes it. It runs here or on a cluster.
    """


@ablate.command("plan")
@click.argument("study", type=A_PATH)
@model_options(Machine)
@click.option("--card", hidden=True, help="What --gpu was called before.")
@click.option("--each", is_flag=True, help="One line a run, with its folder's name, instead of one a stage.")
@as_json
def plan_study(study: Path, each: bool, wants_json: bool, card: str | None, **flags: Any) -> None:
    """Print what STUDY would run, what is done, and the GPU-hours.

    The hours are those that `mirage-ds plan` expects. As `ablate run`, it first checks what evaluations need: records,
    images, scorers, controls.
    """
    from mirage_ds.study.check import check_study
    from mirage_ds.study.overview import overview, planned, print_plan
    from mirage_ds.study.store import open_study

    made, store = open_study(study)
    check_study(made)
    machine = build_model(Machine, flags | {"gpu": flags["gpu"] or card})
    lines = overview(made, store, machine.model_dump(exclude_none=True))
    if wants_json:
        click.echo(json.dumps(planned(made, lines)))
    else:
        print_plan(made, lines, each, f"{machine.nodes} × {machine.gpus_per_node} {machine.gpu.upper()}")


@ablate.command("run")
@click.argument("study", type=A_PATH)
@model_options(RunFlags)
def run_study(study: Path, **flags: Any) -> None:
    """Run what of STUDY is not done; start it again to go on.

    Exit code 0 when all is done, 1 when it is not and nothing more can start, 2 for an error in STUDY, 75 when it was
    stopped.
    """
    from mirage_ds.study.execute import places
    from mirage_ds.study.overview import follow
    from mirage_ds.study.store import open_study

    asked = build_model(RunFlags, flags)
    made, store = open_study(study)
    wanted = made.wanted(asked.arms, asked.only)
    if not asked.only:
        from mirage_ds.study.check import check_study

        # A task of an array is one run of a study that was checked when it was submitted.
        check_study(made)
    if asked.again:
        for key in wanted:
            store.forget_failures(made.nodes[key])
    if asked.slurm:
        from mirage_ds.study.slurm import submit, write_scripts

        arrays = write_scripts(made, store, study, wanted, asked.at_once)
        own = asked.sbatch if asked.sbatch_evaluate is None else asked.sbatch_evaluate
        numbers = submit(arrays, shlex.split(asked.sbatch or ""), shlex.split(own or ""))
        print(f"{len(arrays)} array(s): {', '.join(numbers)}; `mirage-ds ablate status {study}` says how far they are")
        return
    left = [made.nodes[key] for key in wanted if not store.is_done(made.nodes[key])]
    # Where there are only evaluations, one GPU a run is enough.
    ranks = made.spec.launch.ranks if any(node.kind == "train" for node in left) else 1
    found = places(made, ranks, asked.jobs, asked.hostfile, asked.hosts_per_run)
    stop = StopRequest()
    stop.listen()
    # A task of an array has nothing to wait for: what it needs has ended before it began.
    finished = follow(made, store, wanted, found, stop.asked, patient=not asked.only)
    undone = [key for key in wanted if store.state(made.nodes[key]) != "done"]
    if not finished:
        print(f"stopped, {len(undone)} of {len(wanted)} left; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    if undone:
        said = f"{len(undone)} of {len(wanted)} are not done; `mirage-ds ablate status {study}` says why"
        print(said, file=sys.stderr)
        sys.exit(EXIT_HOLES)


@ablate.command("status")
@click.argument("study", type=A_PATH)
@as_json
def show_status(study: Path, wants_json: bool) -> None:
    """Show how far STUDY is and what failed. Works on any machine that sees its folder."""
    from mirage_ds.study.overview import print_status, status
    from mirage_ds.study.store import open_study

    found = status(*open_study(study))
    if wants_json:
        click.echo(json.dumps(found))
    else:
        print_status(found)


@ablate.command("report")
@click.argument("study", type=A_PATH)
@click.option("--out", type=Output(folder=True), help="Folder to write. [default: report/ in the study's `out`]")
@click.option("--with", "others", multiple=True, type=A_PATH, help="Cells run elsewhere (`ablate export`); repeatable.")
def report_study(study: Path, out: Path | None, others: tuple[Path, ...]) -> None:
    """Write a report of what has finished of STUDY.

    It is report.json, .md, .csv, .html and figures, and lists what is missing.
    """
    from mirage_ds.study.collect import collect, with_records
    from mirage_ds.study.report.build import write_report
    from mirage_ds.study.results import merge
    from mirage_ds.study.store import open_study

    need("plot", "`ablate report`, which draws,")
    made, store = open_study(study)
    target = out or store.root / "report"
    check_output(target, "--out", folder=True)
    results, said = merge(collect(made, store), others)
    for line in said:
        print(line)
    write_report(with_records(results, made.spec.evaluations), target)
    print(f"{target}/report.html")


@ablate.command("export")
@click.argument("study", type=A_PATH)
@click.argument("file", type=Output())
def export_study(study: Path, file: Path) -> None:
    """Write the finished cells of STUDY into FILE (.json.gz).

    `ablate report --with` on another machine takes it.
    """
    from mirage_ds.study.collect import collect
    from mirage_ds.study.results import export
    from mirage_ds.study.store import open_study

    made, store = open_study(study)
    print(f"{file}: {export(collect(made, store), file)} of {len(made.cells)} cells")
