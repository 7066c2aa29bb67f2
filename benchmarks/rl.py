"""Seconds of a reinforcement step by part, for several sizes of a rollout; docs/reinforcement.md has the results.

    python -m benchmarks.rl runs/demo/stage2 runs/demo/train/data.jsonl
    python -m benchmarks.rl runs/demo/stage2 runs/demo/train/data.jsonl --cell 16x8 --policy gaussian --steps 30

Prints a row a cell, prompts x answers: means over all steps but the first two. `the rest` is packing, reading prompts,
the optimizer, logs. Exit code 1 where rewards and the rest take more than MOST of a step.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

WARM, MOST = 2, 0.15
COLUMNS = ("decoding", "forward and backward", "rewards", "the rest")


def timed(work: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """Return `work` with its seconds added to `spent`."""

    def call(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            spent.append(time.perf_counter() - begun)

    return call


def measure(world: Any, settings: dict[str, Any]) -> tuple[float, list[float]]:
    """Train; return seconds of a step and those of its COLUMNS."""
    from mirage_ds.config.run import RunConfig
    from mirage_ds.rl.loop import reinforce
    from mirage_ds.run.settings import Run
    from mirage_ds.train import open_run

    run = Run(RunConfig(**settings), world)
    data, learner = open_run(run)
    engine, spent, found = learner.engine, [0.0], []
    engine.forward, engine.backward = timed(engine.forward, spent), timed(engine.backward, spent)
    begun = time.perf_counter()
    for taken in reinforce(run, data, learner):
        seconds, begun = time.perf_counter() - begun, time.perf_counter()
        own = [taken.metrics["decode_seconds"], sum(spent), taken.metrics["scoring_seconds"]]
        found.append([seconds, *own, seconds - sum(own)])
        spent.clear()
    engine.destroy()
    whole, *parts = (sum(column) / len(found[WARM:]) for column in zip(*found[WARM:], strict=True))
    return whole, parts


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("records", type=click.Path(exists=True, path_type=Path))
@click.option("--cell", "cells", multiple=True, default=("16x8", "16x4", "4x8"), show_default=True)
@click.option("--policy", default=None, help="As --latent_policy.")
@click.option("--steps", default=10, show_default=True)
def main(model: Path, records: Path, cells: tuple[str, ...], policy: str | None, steps: int) -> None:
    """Measure each cell and print the table."""
    from mirage_ds.engine.setup import join

    warnings.filterwarnings("ignore", category=FutureWarning)
    world, most = join(), 0.0
    print(f"| prompts x answers | s a step | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for cell in cells:
        prompts, answers = map(int, cell.split("x"))
        with tempfile.TemporaryDirectory() as out:
            whole, parts = measure(world, dict(
                stage="rl", model=str(model), data_path=records, save_model_path=Path(out) / "out", max_steps=steps,
                prompts_per_rollout=prompts, num_generations=answers, max_completion_length=32, report_to=["none"],
                latent_policy=policy, learning_rate=5e-5, warmup_steps=0,
            ))  # fmt: skip
        print(f"| {cell} | {whole:.2f} | {' | '.join(f'{part / whole:.1%}' for part in parts)} |", flush=True)
        most = max(most, sum(parts[2:]) / whole)
    if most > MOST:
        sys.exit(f"{most:.0%} of a step is neither decoding nor forward nor backward, more than {MOST:.0%}")


if __name__ == "__main__":
    main()
