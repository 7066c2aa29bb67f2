"""What a study would run, where it stands, and how far the runs at work are: for `ablate plan`, `run` and `status`.

Read from the runs' files while they grow. Imports no torch.
"""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from mirage_ds.cluster.status.facts import Facts
from mirage_ds.cluster.status.show import print_several
from mirage_ds.cluster.status.summary import summary
from mirage_ds.config.mixture import Mixture, most
from mirage_ds.config.run import RunConfig
from mirage_ds.data.folders import find_files, paths_of
from mirage_ds.data.pack import total_steps
from mirage_ds.data.sources import count_rows
from mirage_ds.errors import UserError
from mirage_ds.plan.fit import Question, rank
from mirage_ds.plan.spec import PlanSpec
from mirage_ds.run import events
from mirage_ds.study.execute import Place, Runner
from mirage_ds.study.nodes import Node, Study
from mirage_ds.study.store import Store

# Some lines of log.jsonl, whose whole is not read every other second.
TAIL_BYTES = 1 << 14
# What the planner is told of a run's settings.
PLANNED = {"model", "stage", "latent_size", "micro_batch_tokens", "gradient_checkpointing", "deepspeed"}
PLANNED |= {"loss_chunk_mb", "feed", "latent_passes", "bottleneck"}
STATES = ("done", "running", "waiting", "failed", "blocked")


class Estimate(NamedTuple):
    """What the planner says of a training node.

    Attributes:
        steps: optimizer steps; None of an evaluation.
        hours: GPU-hours; None without an estimate, and `problem` says why.
    """

    steps: int | None = None
    hours: float | None = None
    problem: str | None = None


@lru_cache
def rows_of(source: Path) -> int:
    """Count the records of a source."""
    return count_rows(find_files(source))


def shown_hours(hours: float, digits: int) -> str:
    """Write GPU-hours with so many digits; what is more than nothing never reads as nothing."""
    least = 10.0**-digits
    return f"under {least:g}" if 0 < hours < least else f"{hours:,.{digits}f}"


def steps_of(config: RunConfig) -> int:
    """Count the optimizer steps of a run, if no record is dropped."""
    records = config.records
    files = paths_of(records)
    counts = [rows_of(file) for file in files]
    weights = records.weights if isinstance(records, Mixture) else None
    rows = sum(most(files, counts, weights) if weights else counts)
    return total_steps(rows, config.rows_per_step, config.epochs, config.max_steps, config.steps_per_rollout)


@lru_cache
def _seconds(spec: PlanSpec) -> float:
    plans = rank(Question(spec))
    if plans[0].problem is not None:
        raise UserError(f"does not fit: {plans[0].problem}")
    return float(plans[0].step.most)


def estimate(config: RunConfig, machine: Mapping[str, Any]) -> Estimate:
    """Estimate a training node.

    Args:
        machine: fields of PlanSpec about machines, rows and images.
    """
    steps = steps_of(config)
    try:
        base = PlanSpec(**config.model_dump(include=PLANNED), **machine)
        ranks = base.nodes * base.gpus_per_node
        each = base.micro_batch_tokens // base.row_tokens * ranks
        spec = base.model_copy(update={"micro_steps": max(1, math.ceil(config.rows_per_step / each))})
        # The planner's micro-batches are full; a step that has fewer rows takes as much less.
        share = config.rows_per_step / (each * spec.micro_steps)
        return Estimate(steps, steps * _seconds(spec) * share * ranks / 3600, None)
    except (UserError, ValueError) as error:
        return Estimate(steps, problem=str(error).splitlines()[0])


class Line(NamedTuple):
    """A node in the overview: how many cells need it, where it stands, what it would take."""

    node: Node
    cells: int
    state: str
    estimate: Estimate


def overview(study: Study, store: Store, machine: Mapping[str, Any] | None = None) -> list[Line]:
    """List every node, with `machine` also what it would take."""
    needed = Counter(key for cell in study.cells for key in cell.nodes)
    lines: dict[str, Line] = {}
    for key, node in study.nodes.items():
        state: str = store.state(node)
        if state == "waiting" and any(lines[one.key].state in ("failed", "blocked") for one in node.needs):
            state = "blocked"
        found = estimate(node.config, machine) if machine is not None and node.kind == "train" else Estimate()
        lines[key] = Line(node, needed[key], state, found)
    return list(lines.values())


def hours_of(lines: Iterable[Line]) -> float:
    """Add up the GPU-hours of those that have an estimate."""
    return sum(line.estimate.hours or 0.0 for line in lines)


def planned(study: Study, lines: Sequence[Line]) -> dict[str, Any]:
    """Return what `ablate plan --json` prints."""
    nodes = [
        {key: getattr(line.node, key) for key in ("folder", "kind", "name")}
        | {"state": line.state, "cells": line.cells}
        | {"steps": line.estimate.steps, "gpu_hours": line.estimate.hours}
        for line in lines
    ]
    return {
        **{"study": study.spec.name, "cells": len(study.cells), "nodes": nodes, "gpu_hours": hours_of(lines)},
        "gpu_hours_left": hours_of(line for line in lines if line.state != "done"),
        "no_estimate": sorted({line.estimate.problem for line in lines if line.estimate.problem}),
    }


def status(study: Study, store: Store) -> dict[str, Any]:
    """Return what `ablate status --json` prints."""
    lines, now = overview(study, store), time.time()
    running = [line.node for line in lines if line.state == "running"]
    failed = [line.node for line in lines if line.state == "failed"]
    return {
        "study": study.spec.name,
        "runs": {name: dict(Counter(line.state for line in group)) for name, group in grouped(lines).items()},
        "arms": by_arm(study, lines),
        "running": {node.folder: glance(node, store, now) for node in running},
        "failed": {node.folder: store.attempts(node)[-1]["why"] for node in failed},
    }


def grouped(lines: Iterable[Line], each: bool = False) -> dict[str, list[Line]]:
    """Put the lines of one stage or evaluation together, in their order; each for itself where `each`."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        node = line.node
        title = node.name if node.kind == "train" else f"{node.kind} {node.name}"
        found.setdefault(node.folder if each else title, []).append(line)
    return found


def by_arm(study: Study, lines: Iterable[Line]) -> dict[str, dict[str, int]]:
    """Count the cells of each arm: done, failed (something it needs has), running, waiting."""
    states = {line.node.key: line.state for line in lines}
    found: dict[str, Counter[str]] = {}
    for cell in study.cells:
        own = [states[key] for key in cell.nodes]
        state = next((one for one in ("failed", "running", "waiting") if one in own), "done")
        found.setdefault(cell.arm, Counter())[state] += 1
    return {name: dict(counts) for name, counts in found.items()}


def reached(node: Node, store: Store) -> tuple[int, int | None]:
    """Return the last optimizer step that a run has logged, and how many it will have; None while it has not said.

    An evaluation says nothing of itself while it works.
    """
    run = store.model(node) / "run"
    # Not there yet, or taken away by a run that begins anew: who only looks must not end the study by it.
    with suppress(OSError):
        steps = json.loads((run / "run.json").read_text()).get("steps")
        with (run / "log.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            # The last line may be half written.
            taken = re.findall(rb'"step": (\d+)[,}]', file.read())
        return int(taken[-1]) if taken else 0, steps
    return 0, None


def glance(node: Node, store: Store, now: float) -> dict[str, Any] | None:
    """Sum a training run up as `mirage-ds status` does; None for an evaluation, or before it has written anything."""
    model = store.model(node)
    if not (model / "run" / events.FILE).is_file():
        return None
    return {**summary(Facts(model), now), "run": str(store.place(node))}


def print_plan(study: Study, lines: Sequence[Line], each: bool, where: str) -> None:
    """Show what a study would run, one row a stage, or a run where `each`; `where` are the machines."""
    head = ["what", "runs", "for arms × seeds", "steps", "GPU-hours", "state"]
    table = Table(Column("run", overflow="fold"), *head, title=study.spec.name)
    for name, group in grouped(lines, each).items():
        node, said = group[0].node, ["", ""]
        if node.kind == "train":
            steps = [line.estimate.steps or 0 for line in group]
            hours = [line.estimate.hours for line in group if line.estimate.hours is not None]
            said = [" … ".join(f"{n:,}" for n in sorted({min(steps), max(steps)}))]
            said.append(shown_hours(sum(hours), 2) if hours else "–")
        counts = Counter(line.state for line in group)
        states = ", ".join(f"{count} {state}" if len(counts) > 1 else state for state, count in counts.items())
        kind = node.config.stage if node.kind == "train" else node.kind
        table.add_row(name, kind, str(len(group)), str(sum(line.cells for line in group)), *said, states)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    found = planned(study, lines)
    trained, alone = sum(line.node.kind == "train" for line in lines), sum(len(cell.stages) for cell in study.cells)
    once = f" instead of {alone}, since equal parts run once" if alone > trained else ""
    evaluated = f"{len(lines) - trained} evaluations"
    console.print(f"{found['cells']} cells (arms × seeds); {trained} training runs{once}; {evaluated}")
    if found["gpu_hours"]:
        whole, rest = (shown_hours(found[key], 1) for key in ("gpu_hours", "gpu_hours_left"))
        console.print(f"{whole} GPU-hours on {where} by the planner, {rest} left")
    for problem in found["no_estimate"]:
        console.print(f"no estimate: {problem}", markup=False)


def print_status(found: Mapping[str, Any]) -> None:
    """Show what `ablate status --json` prints."""
    console = Console(highlight=False, soft_wrap=True)
    for title, first, counts_of in ((found["study"], "run", found["runs"]), ("arms, by seeds", "arm", found["arms"])):
        # Names of arms are long and differ at their ends.
        table = Table(Column(first, overflow="fold"), *STATES, title=title)
        for name, counts in counts_of.items():
            table.add_row(escape(name), *(str(counts.get(state, "")) for state in STATES))
        console.print(table)
    seen = [one for one in found["running"].values() if one is not None]
    if seen:
        print_several(seen, console)
    for folder, one in found["running"].items():
        if one is None:
            console.print(f"running: {folder}", markup=False)
    for folder, why in found["failed"].items():
        console.print(f"failed: {folder}: {why}", markup=False)


class Bars:
    """The study's bar, and one a run at work below it."""

    def __init__(self, bars: Progress, store: Store, title: str, wanted: Sequence[Node]):
        self._bars, self._store, self._wanted = bars, store, wanted
        self._whole = bars.add_task(title, total=len(wanted))
        self._tasks: dict[str, TaskID] = {}

    def show(self, nodes: Iterable[Node]) -> None:
        """Bring the bars to where these nodes are, and take away those of others."""
        self._bars.update(self._whole, completed=sum(map(self._store.is_done, self._wanted)))
        working = {node.key: node for node in nodes}
        for key in self._tasks.keys() - working.keys():
            self._bars.remove_task(self._tasks.pop(key))
        for key, node in working.items():
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(f"  {node.folder}", total=None)
            step, steps = reached(node, self._store)
            self._bars.update(self._tasks[key], completed=step, total=steps)


def follow(
    study: Study, store: Store, wanted: list[str], places: list[Place], asked: Callable[[], bool], patient: bool
) -> bool:
    """Run with bars below the lines, the study's and one a run at work; False where it was stopped (execute.Runner)."""
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = Bars(progress, store, study.spec.name, [study.nodes[key] for key in wanted])
        say = partial(console.print, markup=False)
        return Runner(study, store, places, say, wanted).run(asked, patient, bars.show)
