"""Training: `deepspeed --module mirage_ds.train --model … --stage … --data_path … --save_model_path …`.

Read it from the top: main → run → train → step → micro_step.

W ranks, G micro-steps of a step, B rows of a step.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist

from mirage_ds.config import RunConfig, read_yaml
from mirage_ds.data.batch import Batch, to_device
from mirage_ds.data.loader import WARN_DROPPED_SHARE
from mirage_ds.data.pack import StepPlan
from mirage_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from mirage_ds.engine.setup import World, join
from mirage_ds.errors import EXIT_USER_ERROR, UserError
from mirage_ds.flags import CONTEXT, build_model, model_options
from mirage_ds.model.loss import LossSums, StepCounts, objective
from mirage_ds.monitor import Monitor
from mirage_ds.prepare import SKIPPED_FILE, Evaluation, Prepared, prepare


@click.command(context_settings=CONTEXT, no_args_is_help=True)
@model_options(RunConfig)
@click.option("--config", "yaml_file", type=click.Path(path_type=Path), help="YAML file of the same settings.")
@click.option("--local_rank", hidden=True, help="Passed by some launchers; the environment says it too.")
def command(yaml_file: Path | None, local_rank: str | None, **flags: Any) -> None:
    """Train one stage of a Mirage model. Flags win over the YAML file, which wins over defaults."""
    del local_rank
    values = read_yaml(yaml_file) if yaml_file else None
    run(build_model(RunConfig, flags, values, source=str(yaml_file)))


def main() -> None:
    """Run the command; a user's mistake is one sentence, said once, and exit code 2 on every rank."""
    # DeepSpeed calls collectives that torch has renamed: nothing the user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    says = os.environ.get("RANK", "0") == "0"
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        # What goes wrong in the middle of a run may be known to one rank alone.
        message, says = str(error), says or not error.everywhere
    else:
        return
    if says:
        print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201  # before any console exists
    sys.stdout.flush()
    # No clean-up that waits for other ranks: they may be waiting in a collective for this one.
    os._exit(EXIT_USER_ERROR)


def run(config: RunConfig) -> None:
    """Train as `config` says. All ranks call it.

    Raises:
        UserError: something the user can mend.
    """
    world = join()
    train(config, prepare(config, world), world)
    dist.destroy_process_group()


def train(config: RunConfig, prepared: Prepared, world: World) -> None:
    """Take every optimizer step, write checkpoints on the way and the model at the end."""
    own_folder = config.save_model_path / "run"
    report_to: list[str] = list(config.report_to)
    start = load_checkpoint(prepared.engine, prepared.checkpoint) if prepared.checkpoint else 0
    active = world.rank == 0
    with Monitor(own_folder, prepared.steps, report_to, config.log_file, active, start) as monitor:
        for line in opening_lines(config, prepared):
            monitor.say(line)
        monitor.start_clock()
        for plan, batches in prepared.loader.steps(start, prepared.steps):
            metrics, tokens = step(config, prepared, plan, batches)
            done = plan.step + 1
            epoch = done * config.rows_per_step / len(prepared.measured.row_ids)
            monitor.step(done, epoch, len(plan.rows), tokens, metrics)
            if prepared.evaluation and config.eval_every and (done % config.eval_every == 0 or done == prepared.steps):
                monitor.evaluation(done, evaluate(config, prepared, prepared.evaluation))
            if config.save_every and done % config.save_every == 0:
                state = {**prepared.state, "step": done}
                place = save_checkpoint(prepared.engine, own_folder / "checkpoints", state, config.keep_checkpoints)
                monitor.say(f"checkpoint {place}")
            monitor.start_clock()
        prepared.save()
        monitor.say(f"model saved to {config.save_model_path}")


def opening_lines(config: RunConfig, prepared: Prepared) -> Iterator[str]:
    """Say what is about to be trained."""
    index, world = prepared.measured, prepared.world
    yield (
        f"{config.stage}: {len(index.row_ids)} rows of {index.tokens.min()}–{index.tokens.max()} tokens (mean "
        f"{index.tokens.mean():.0f}), {config.rows_per_step} rows a step, {prepared.steps} steps, {world.size} rank(s) "
        f"on {world.device.type}, attention {prepared.engine.module.attention}, k {config.latent_size}"
    )
    warning = "warning: " if index.dropped_share > WARN_DROPPED_SHARE else ""
    if prepared.checkpoint:
        yield f"continuing from {prepared.checkpoint}"
    yield f"{warning}{index.dropped} row(s) dropped as longer than --max_length {config.max_length}"
    if prepared.skipped:
        file, fault = prepared.skipped[0]
        yield (
            f"warning: {len(prepared.skipped)} faulty record(s) skipped, listed in "
            f"{config.save_model_path / 'run' / SKIPPED_FILE}; the first is {file}: {fault}"
        )


def step_counts(prepared: Prepared, plan: StepPlan, latent_size: int) -> tuple[StepCounts, int]:
    """Count what the whole step holds, over all ranks and micro-steps, and its tokens.

    From the plan alone, before the first backward: no rank asks another.
    """
    index = prepared.measured
    places = np.searchsorted(index.row_ids, plan.rows)
    counts = StepCounts(
        rows=len(plan.rows), labels=int(index.labels[places].sum()), latents=int(index.runs[places].sum()) * latent_size
    )
    return counts, int(index.tokens[places].sum())


def step(
    config: RunConfig, prepared: Prepared, plan: StepPlan, batches: Iterator[Batch]
) -> tuple[dict[str, float], int]:
    """Take one optimizer step over its G micro-steps; return its metrics and its tokens over all ranks."""
    engine = prepared.engine
    counts, tokens = step_counts(prepared, plan, config.latent_size)
    totals = torch.zeros(4, device=prepared.world.device)
    for number, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(number == plan.micro_steps - 1)
        totals += micro_step(config, prepared, batch, counts)
    learning_rate = engine.get_lr()[0]
    # ZeRO-0 in fp32 keeps no norm; there the gradients are whole and averaged by now.
    whole = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(whole) if whole else None
    engine.step()
    dist.all_reduce(totals)
    loss, ce, sim, token_ce = totals.tolist()
    metrics = {
        "loss": loss,
        "ce": ce,
        **({"sim": sim} if config.stage == "stage1" else {}),
        "token_ce": token_ce / max(1, counts.labels),
        "grad_norm": float(engine.get_global_grad_norm() if norm is None else norm),
        "lr": float(learning_rate),
        "micro_steps": plan.micro_steps,
    }
    return metrics, tokens


@torch.no_grad()
def evaluate(config: RunConfig, prepared: Prepared, evaluation: Evaluation) -> dict[str, float]:
    """Measure the mean losses on the evaluation records. All ranks call it."""
    engine, world = prepared.engine, prepared.world
    totals = torch.zeros(4, device=world.device)
    engine.eval()
    for batch in evaluation.loader.batches(micro[world.rank] for micro in evaluation.bins):
        sums, loss, ce, sim = forward(config, prepared, batch, evaluation.counts)
        totals += torch.stack([loss, ce, sim, sums.token_ce])
    engine.train()
    dist.all_reduce(totals)
    loss, ce, sim, token_ce = totals.tolist()
    parts = {"sim": sim} if config.stage == "stage1" else {}
    return {"loss": loss, "ce": ce, **parts, "token_ce": token_ce / max(1, evaluation.counts.labels)}


def forward(
    config: RunConfig, prepared: Prepared, batch: Batch, counts: StepCounts
) -> tuple[LossSums, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one micro-batch forward; return its sums and its share of the step's (loss, ce, sim)."""
    if prepared.tower is not None:
        batch = prepared.tower.attach(batch)
    sums = prepared.engine(to_device(batch, prepared.world.device))
    return sums, *objective(sums, counts, config.gamma, config.reduction)


def micro_step(config: RunConfig, prepared: Prepared, batch: Batch, counts: StepCounts) -> torch.Tensor:
    """Forward and backward over one micro-batch; return (loss, ce, sim, token_ce), its share of the step's."""
    sums, loss, ce, sim = forward(config, prepared, batch, counts)
    # DeepSpeed divides gradients by the number of ranks (and by an accumulation that it is told is 1).
    prepared.engine.backward(loss * prepared.world.size)
    return torch.stack([loss.detach(), ce.detach(), sim.detach(), sums.token_ce])


if __name__ == "__main__":
    main()
