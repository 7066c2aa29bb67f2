"""`mirage-ds replay`, also as one process a GPU, under a launcher. Imports stay inside: `--help` is quick."""

import os
from pathlib import Path

import click

from mirage_ds.config.flags import CONTEXT
from mirage_ds.run.process import run_rank
from mirage_ds.run.stop import StopRequest


@click.command(context_settings=CONTEXT)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("step", type=click.IntRange(min=1))
# Passed by some launchers; the environment says it too.
@click.option("--local_rank", hidden=True, expose_value=False)
def replay(run: Path, step: int) -> None:
    """Take one step of a run again, and show its rows and gradients.

    RUN is a --save_model_path folder, which is only read; STEP is a step in its log. The steps from the newest
    checkpoint before STEP are taken again; tables show the loss of each row and the gradient's norm in each layer.
    Start it in the folder where the run was started.

    With as many ranks as the run had, on GPUs or on CPUs (DS_ACCELERATOR=cpu):
    deepspeed --num_gpus RANKS --module mirage_ds.cluster.replay RUN STEP.
    """
    from mirage_ds.cluster.replay.again import replay as take_again

    take_again(run, step)


def main() -> None:
    """Be `python -m mirage_ds.cluster.replay`, one rank of those that a launcher starts, or a single process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Nothing is written that could be half-written.
    StopRequest().listen(at_once=True)
    run_rank(replay)
