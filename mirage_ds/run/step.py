"""One optimizer step over its micro-steps.

W ranks, G micro-steps of a step, B rows of a step, N samples of a micro-batch.
"""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mirage_ds.data.batch import Batch, to_device
from mirage_ds.data.pack import StepPlan
from mirage_ds.data.selection import Selection
from mirage_ds.engine.private import backward, empty_sums
from mirage_ds.engine.setup import everyone
from mirage_ds.model.loss import LossSums, StepCounts, objective
from mirage_ds.plan.mfu import ModelFlops
from mirage_ds.run.heartbeat import COLLECTIVE
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Data, Learner


class Taken(NamedTuple):
    """What an optimizer step came to.

    Attributes:
        metrics: of the whole step, over all ranks: loss and its parts, grad_norm, lr, labels, rows, tokens, …, with
            --log_rows the row_ids that ran; data_seconds that this rank waited for data.
        applied: False where a loss or gradient was not finite: the weights and the schedule are as before.
        stop: whether the ranks have agreed to stop.
        ran: this rank's rows and losses, a pair of (N,) tensors a micro-step.
        rows: all dataset rows of the step.
    """

    metrics: dict[str, Any]
    applied: bool
    stop: bool
    ran: list[tuple[torch.Tensor, torch.Tensor]]
    rows: list[int]


def step(run: Run, data: Data, learner: Learner, plan: StepPlan, batches: Iterator[Batch]) -> Taken:
    """Take one optimizer step over its G micro-steps."""
    config, engine, at = run.config, learner.engine, run.journal.at
    done = plan.step + 1
    counts, lengths = step_counts(data.index, plan)
    totals = torch.zeros(6, device=run.world.device)
    ran = []
    at("waits for data", done)
    tower_flops = waited = 0.0
    begun = time.perf_counter()
    for number, batch in enumerate(batches):
        waited += time.perf_counter() - begun
        at(f"forward and backward of micro-step {number + 1}", done)
        tower_flops += encoding_flops(learner.flops, batch)
        engine.set_gradient_accumulation_boundary(number == plan.micro_steps - 1)
        shares, losses = micro_step(run, learner, batch, counts)
        totals[:4] += shares
        ran.append((batch.rows, losses))
        at("waits for data", done)
        begun = time.perf_counter()
    at("updates the weights", done)
    learning_rate = engine.get_lr()[0]
    applied, norm = apply_gradients(engine, config.max_grad_norm)
    totals[4] = float(run.asked())
    totals[5] = tower_flops
    at("sums up the losses", done, COLLECTIVE)
    dist.all_reduce(totals)
    loss, ce, sim, token_ce, stops, tower_flops = totals.tolist()
    metrics: dict[str, Any] = {
        "loss": loss,
        "ce": ce,
        **({"sim": sim} if config.stage == "stage1" else {}),
        "token_ce": token_ce / max(1, counts.labels),
        "grad_norm": norm,
        "lr": float(learning_rate),
        "labels": counts.labels,
        "rows": counts.rows,
        "tokens": sum(lengths),
        "micro_steps": plan.micro_steps,
        "skipped": int(not applied),
        "model_flops": round(learner.flops.of_text(lengths, counts.labels) + tower_flops),
        "data_seconds": round(waited, 4),
    }
    if config.log_rows:
        metrics["row_ids"] = everyone([row for rows, _ in ran for row in rows.tolist() if row >= 0], run.world)
    return Taken(metrics, applied, stops > 0, ran, plan.rows)


def step_counts(index: Selection, plan: StepPlan) -> tuple[StepCounts, list[int]]:
    """Count what the whole step holds, over all ranks and micro-steps, and the tokens of each row.

    From the plan alone, before the first backward: no rank asks another.
    """
    places = np.searchsorted(index.row_ids, plan.rows)
    counts = StepCounts(len(plan.rows), int(index.labels[places].sum()), int(index.latents[places].sum()))
    return counts, index.tokens[places].tolist()


def encoding_flops(flops: ModelFlops, batch: Batch) -> float:
    """Count the tower's work on those images of a micro-batch whose features were not kept.

    Args:
        batch: as the loader gives it, on the CPU.
    """
    grids = batch.image_grid_thw.tolist() if batch.image_features is None else []
    helpers = batch.helper_grid_thw.tolist() if batch.helper_features is None else []
    return flops.of_images(grids, helpers)


def micro_step(run: Run, learner: Learner, batch: Batch, counts: StepCounts) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward over one micro-batch.

    Returns:
        (loss, ce, sim, token_ce), its share of the step's, and the (N,) losses of its samples.
    """
    sums, loss, ce, sim = forward(run, learner, batch, counts)
    # An infinite loss may have a finite gradient. Turned into NaN it reaches every rank with the gradients, whose norm
    # the optimizer then refuses: all ranks agree without another collective.
    finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
    # DeepSpeed divides gradients by the number of ranks (and by an accumulation that it is told is 1).
    backward(learner.engine, loss * finite * run.world.size, sums.earlier)
    learner.engine.module.layers.round.check()
    return torch.stack([loss.detach(), ce.detach(), sim.detach(), sums.token_ce]), sums.rows


def forward(
    run: Run, learner: Learner, batch: Batch, counts: StepCounts
) -> tuple[LossSums, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one micro-batch forward; return its sums and its share of the step's (loss, ce, sim)."""
    sums = learner.engine(to_device(learner.attach(batch), run.world.device))
    return sums, *objective(sums, counts, run.config.gamma, run.config.reduction)


def apply_gradients(engine: Any, max_norm: float) -> tuple[bool, float]:
    """Let the optimizer step unless the gradient is not finite; return whether it did and the norm before clipping.

    Args:
        max_norm: 0 clips nothing. Used where DeepSpeed was not told to clip (setup.make_engine).
    """
    # ZeRO-0 in fp32 keeps no norm and refuses nothing; there the gradients are whole and averaged by now.
    moved = [p for p in engine.module.parameters() if p.grad is not None]
    if not moved:
        engine.step()
        empty_sums(engine)
        return engine.was_step_applied(), float(engine.get_global_grad_norm())
    total = torch.nn.utils.get_total_norm(p.grad for p in moved)
    norm = float(total)
    if not math.isfinite(norm):
        engine.zero_grad()
        return False, norm
    if norm > max_norm > engine.gradient_clipping():
        torch.nn.utils.clip_grads_with_norm_(moved, max_norm, total)
    engine.step()
    return engine.was_step_applied(), norm


def guilty(run: Run, taken: Taken) -> tuple[list[int], bool]:
    """Name the rows whose loss was not finite; all of the step, and True, where only the gradient was not."""
    own = [(row, loss) for rows, losses in taken.ran for row, loss in zip(rows.tolist(), losses.tolist(), strict=True)]
    ran = everyone([(row, loss) for row, loss in own if row >= 0], run.world)
    bad = [row for row, loss in ran if not math.isfinite(loss)]
    return bad or [row for row, _ in ran], not bad
