"""A step of a run taken again, from the checkpoint before it and up to its update, so that it can be looked at.

N samples of a micro-batch.
"""

from itertools import islice
from math import hypot, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist

from mirage_ds.cluster.status.facts import find_run, json_lines, split_log
from mirage_ds.config.flags import build_model, read_yaml
from mirage_ds.config.run import RunConfig
from mirage_ds.data.progress import track
from mirage_ds.engine.checkpoint import find_checkpoint
from mirage_ds.engine.gradients import gradient_norms
from mirage_ds.engine.manifest import candidates, step_of
from mirage_ds.engine.setup import everyone, join
from mirage_ds.engine.universal import use_universal
from mirage_ds.errors import UserError
from mirage_ds.evaluate.tables import print_table
from mirage_ds.run.settings import Run, check_settings
from mirage_ds.run.setup import Data, Learner, open_data, open_engine, open_model, state_of
from mirage_ds.run.step import micro_step, step, step_counts

# Settings of what a run writes and evaluates: no step depends on them.
OTHERS = {"resume", "overwrite", "log_file", "save_best", "profile_steps"}
OTHERS |= {"kernels", "eval_data_path", "eval_every", "eval_decode", "eval_pictures"}


class Again(NamedTuple):
    """What a step came to, up to its update; the same on every rank.

    Attributes:
        rows: row, file, line and loss (LossSums.rows) of each, the largest loss first.
        norms: layer → norm of its gradient, before clipping.
    """

    loss: float
    rows: list[dict[str, Any]]
    norms: dict[str, float]


def replay(folder: Path, number: int) -> None:
    """Take step `number`, from 1, of a run again and print it. All ranks call it; the run's folder is only read.

    Raises:
        UserError: see logged_step and take_again.
    """
    folder = find_run(folder)
    logged = logged_step(folder, number)
    with TemporaryDirectory() as nowhere:
        config = settings_of(folder, nowhere)
        world = join(config.start_timeout)
        again = take_again(Run(config, world), folder, number)
    world.waiting.part()
    if world.rank == 0:
        show(again, number, logged)
    dist.destroy_process_group()


def logged_step(folder: Path, number: int) -> dict[str, Any]:
    """Return what a run has logged of a step.

    Raises:
        UserError: it has logged no such step, or has no checkpoint before it.
    """
    steps, _ = split_log(json_lines(folder / "run" / "log.jsonl"))
    found = [line for line in steps if line["step"] == number]
    if not found:
        last = steps[-1]["step"] if steps else 0
        raise UserError(f"step {number}: the last in {folder / 'run' / 'log.jsonl'} is step {last}; name one in there")
    there = [step_of(place) for place in candidates(folder / "run" / "checkpoints")]
    if not any(step < number for step in there):
        oldest = f"the oldest is of step {there[-1]}" if there else "there is none"
        what = f"{folder / 'run' / 'checkpoints'} has no checkpoint of an earlier step ({oldest})"
        how = "train with --save_every and more --keep_checkpoints, or name a later step"
        raise UserError(f"step {number}: {what}; {how}")
    return found[0]


def settings_of(folder: Path, nowhere: str) -> RunConfig:
    """Return a run's settings; what it might write goes to `nowhere`.

    Raises:
        UserError: its rows are sampled, so its records alone give no step.
    """
    file = folder / "run" / "config.yaml"
    values = {name: value for name, value in read_yaml(file).items() if name not in OTHERS}
    if values.get("stage") == "rl":
        raise UserError(
            f"{folder}: replay takes no steps of --stage rl; run/completions.jsonl has their answers with rewards and "
            "advantages, and --resume auto in a copy of the folder repeats those since a checkpoint"
        )
    return build_model(RunConfig, {}, values | {"save_model_path": nowhere, "report_to": ["none"]}, str(file))


def take_again(run: Run, folder: Path, number: int) -> Again:
    """Take step `number` of the run in `folder` again, and those before it since its checkpoint. All ranks call it.

    Args:
        run: of settings_of.

    Raises:
        UserError: records, model or ranks are others than those of the checkpoint, or none is whole.
    """
    data, learner = _open(run, folder / "run" / "checkpoints", number)
    start, ranks, first = learner.start, learner.resumed["world_size"], run.world.rank == 0
    steps, missing = data.loader.steps(start, number), number - 1 - start
    if first:
        others = f" of {ranks} rank(s), here {run.world.size}: losses are equal up to rounding"
        said = others if ranks != run.world.size else ""
        click.echo(f"{missing} step(s) to take before step {number}, from the checkpoint of step {start}{said}")
    for plan, batches in track(islice(steps, missing), "steps before", missing, quiet=not first):
        step(run, data, learner, plan, batches)
    plan, batches = next(steps)
    counts, _ = step_counts(data.index, plan)
    loss, own = torch.zeros((), device=run.world.device), []
    for at, batch in enumerate(batches):
        learner.engine.set_gradient_accumulation_boundary(at == plan.micro_steps - 1)
        shares, losses = micro_step(run, learner, batch, counts)
        loss += shares[0]
        own += [one for one in zip(batch.rows.tolist(), losses.tolist(), strict=True) if one[0] >= 0]
    dist.all_reduce(loss)
    norms = gradient_norms(learner.engine.module)
    # Those that are not finite first.
    ran = sorted(everyone(own, run.world), key=lambda one: (isfinite(one[1]), -one[1]))
    places = data.index.rows.places_of(row for row, _ in ran)
    rows = [{**place, "loss": one[1]} for place, one in zip(places, ran, strict=True)]
    return Again(float(loss), rows, norms)


def _open(run: Run, checkpoints: Path, number: int) -> tuple[Data, Learner]:
    """Open a run as training does, at the newest checkpoint before a step, without claiming its folder."""
    checked = check_settings(run)
    data = open_data(run, checked)
    state = state_of(run, checked, data)
    found = find_checkpoint(checkpoints, state, run.world, number, f"step {number}")
    use_universal(checked.ds_values, found is not None and found.universal)
    return data, open_engine(run, checked, data, open_model(run, checked, data), state, found)


def show(again: Again, number: int, logged: dict[str, Any]) -> None:
    """Print rows, layers, and the step beside what was logged of it."""
    rows = [[f"{one['row']}", one["file"], f"{one['line']}", f"{one['loss']:.6f}"] for one in again.rows]
    print_table(["row", "file", "line", "loss, unweighted"], rows, f"rows of step {number}")
    layers = [[layer, f"{norm:.6g}"] for layer, norm in again.norms.items()]
    print_table(["layer", "gradient norm"], layers, "gradients, before clipping")
    for name, value in (("loss", again.loss), ("grad_norm", hypot(*again.norms.values()))):
        click.echo(f"{name} {value:.8g}, logged {logged[name] if logged[name] is not None else 'as not finite'}")
