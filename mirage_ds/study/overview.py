"""What a study would run, and where it stands: for `ablate plan` and `ablate status`. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.config.mixture import Mixture, Records
from mirage_ds.config.run import RunConfig
from mirage_ds.data.pack import total_steps
from mirage_ds.data.proportion import most
from mirage_ds.errors import UserError
from mirage_ds.plan.fit import Question, chosen, rank
from mirage_ds.plan.spec import PlanSpec
from mirage_ds.study.nodes import Node, Study
from mirage_ds.study.store import Store


class Estimate(NamedTuple):
    """What the planner says of a training node.

    Attributes:
        steps: optimizer steps, None where the records cannot be counted quickly (Parquet, folders).
        hours: GPU-hours; None without an estimate, and `problem` says why.
    """

    steps: int | None
    hours: float | None
    problem: str | None


@lru_cache
def rows_of(source: Path) -> int | None:
    """Count the records of a JSON-lines file; None for other sources."""
    if not source.is_file() or source.suffix == ".parquet":
        return None
    with source.open("rb") as file:
        return sum(1 for line in file if line.strip())


def shown_hours(hours: float, digits: int) -> str:
    """Write GPU-hours with so many digits; what is more than nothing never reads as nothing."""
    least = 10.0**-digits
    return f"under {least:g}" if 0 < hours < least else f"{hours:,.{digits}f}"


def _rows_of_records(records: Records) -> int | None:
    if not isinstance(records, Mixture):
        return rows_of(records)
    counts = [rows_of(part.file) for part in records.parts]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    return sum(most([part.file for part in records.parts], known, records.weights) if records.weights else known)


def steps_of(config: RunConfig) -> int | None:
    """Count the optimizer steps of a run, if no record is dropped."""
    rows = _rows_of_records(config.records)
    if rows is None:
        return config.max_steps
    return total_steps(rows, config.rows_per_step, config.epochs, config.max_steps)


def planned_model(model: str) -> str:
    """Return how the planner calls a model: a hub id of a public shape by that shape's name."""
    name = model.rpartition("/")[2].lower()
    sizes = [size for size in ("72b", "32b", "7b", "3b") if f"qwen2.5-vl-{size}" in name]
    return f"qwen2.5-vl-{sizes[0]}" if sizes and not Path(model).is_dir() else model


@lru_cache
def _seconds(spec: PlanSpec) -> float:
    plans = rank(Question(spec), chosen(spec))
    if plans[0].problem is not None:
        raise UserError(f"does not fit: {plans[0].problem}")
    return float(plans[0].step.most)


def estimate(config: RunConfig, machine: Mapping[str, Any]) -> Estimate:
    """Estimate a training node.

    Args:
        machine: fields of PlanSpec about machines, rows and images.
    """
    steps = steps_of(config)
    if steps is None:
        return Estimate(None, None, "its records are not counted before it starts")
    try:
        base = PlanSpec(
            model=planned_model(str(config.model)),
            stage=config.stage,
            latent_size=config.latent_size,
            micro_batch_tokens=config.micro_batch_tokens,
            gradient_checkpointing=config.gradient_checkpointing,
            deepspeed=config.deepspeed,
            loss_chunk_mb=config.loss_chunk_mb,
            **machine,
        )
        ranks = base.nodes * base.gpus_per_node
        each = base.micro_batch_tokens // base.row_tokens * ranks
        spec = base.model_copy(update={"micro_steps": max(1, math.ceil(config.rows_per_step / each))})
        # The planner's micro-batches are full; a step that has fewer rows takes as much less.
        share = config.rows_per_step / (each * spec.micro_steps)
        return Estimate(steps, steps * _seconds(spec) * share * ranks / 3600, None)
    except UserError as error:
        return Estimate(steps, None, str(error))
    except ValueError as error:
        return Estimate(steps, None, str(error).splitlines()[0])


class Line(NamedTuple):
    """A node in the overview."""

    node: Node
    arms: int
    state: str
    estimate: Estimate | None


def overview(study: Study, store: Store, machine: Mapping[str, Any] | None = None) -> list[Line]:
    """List every node: how many cells need it, where it stands and, with `machine`, what it would take."""
    needed = Counter(key for cell in study.cells for key in cell.nodes)
    states = states_of(study, store)
    return [
        Line(
            node,
            needed[key],
            states[key],
            estimate(node.config, machine) if machine is not None and node.kind == "train" and node.config else None,
        )
        for key, node in study.nodes.items()
    ]


def states_of(study: Study, store: Store) -> dict[str, str]:
    """Say where every node stands: store.State, or "blocked" where a node that it needs has failed."""
    states: dict[str, str] = {}
    for key, node in study.nodes.items():
        own = store.state(node)
        above = states[node.parent] if node.parent else ""
        states[key] = "blocked" if own == "waiting" and above in ("failed", "blocked") else own
    return states


def title_of(node: Node) -> str:
    """Return how a node is called among others of its stage or evaluation."""
    return node.name if node.kind == "train" else f"{node.kind} {node.name}"


def grouped(lines: list[Line], each: bool) -> dict[str, list[Line]]:
    """Put the lines of one stage or evaluation together, in their order; each for itself where `each`."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.node.folder if each else title_of(line.node), []).append(line)
    return found


def counted(lines: list[Line]) -> dict[str, dict[str, int]]:
    """Count states by kind of node and name: {"stage1": {"done": 3, "waiting": 1}, …}."""
    return {name: dict(Counter(line.state for line in group)) for name, group in grouped(lines, each=False).items()}


def by_arm(study: Study, store: Store) -> dict[str, dict[str, int]]:
    """Count the cells of each arm: done, failed (something it needs has), running, waiting."""
    states = states_of(study, store)
    found: dict[str, Counter[str]] = {}
    for cell in study.cells:
        own = [states[key] for key in cell.nodes]
        state = next((one for one in ("failed", "running", "waiting") if one in own), "done")
        found.setdefault(cell.arm, Counter())[state] += 1
    return {name: dict(counts) for name, counts in found.items()}
