"""`mirage-ds train`: a run on this machine, through DeepSpeed's launcher and the guards. Imports no torch."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mirage_ds.cluster.guard import launch
from mirage_ds.cluster.here import Job, free_ports, this_machine, visible_gpus
from mirage_ds.config.flags import CONTEXT, WORDS, RunCommand, run_config, run_options
from mirage_ds.engine.place import Place, is_rank
from mirage_ds.errors import UserError

# Where there is no GPU. One would show nothing of what several ranks do.
CPU_RANKS = 2
PORTS_END = 65535


@click.command(cls=RunCommand, context_settings=CONTEXT)
@run_options
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    envvar="MIRAGE_RANKS",
    help=f"Processes. [default: one for each GPU that CUDA_VISIBLE_DEVICES leaves; {CPU_RANKS} without a GPU]",
)
@click.pass_context
def train(ctx: click.Context, yaml_file: Path | None, ranks: int | None, **flags: Any) -> None:
    """Train one stage on this machine's GPUs, or on its CPU.

    Flags win over the YAML file, which wins over defaults. DeepSpeed's launcher starts the ranks, each under a guard
    that ends all of them when one fails. Ctrl-C saves and ends with code 75; a second one ends at once. On several
    hosts the scripts in launch/ take the same flags.
    """
    from mirage_ds.run.beforehand import check_beforehand

    config = run_config(yaml_file, flags)
    if is_rank(os.environ):
        raise UserError("a launcher has started this as a rank (RANK is set); let it start the module mirage_ds.train")
    gpus = visible_gpus(os.environ)
    count = ranks or len(gpus) or CPU_RANKS
    if gpus and count > len(gpus):
        raise UserError(f"--ranks {count}: there are {len(gpus)} GPUs here; lower it, or set DS_ACCELERATOR=cpu")
    check_beforehand(config, count)
    words = _without_ranks(ctx.meta[WORDS])
    where = f"GPU {','.join(gpus[:count])}" if gpus else "the CPU: there is no GPU, or DS_ACCELERATOR=cpu"
    click.echo(f"{count} rank(s) on {where}")
    click.echo(f"on several hosts: launch/deepspeed.sh HOSTFILE {shlex.join(words)}")
    sys.stdout.flush()
    _start(["mirage_ds.train", *words], count, gpus)


def _without_ranks(words: Sequence[str]) -> list[str]:
    """Leave out --ranks: the launcher tells the ranks."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--ranks":
            next(rest)
        elif not word.startswith("--ranks="):
            kept.append(word)
    return kept


def _start(module: list[str], ranks: int, gpus: Sequence[str]) -> None:
    """Be the guard around the launcher of a module; this process ends with the job's code."""
    own = os.environ
    if not gpus:
        own.setdefault("DS_ACCELERATOR", "cpu")
    threads = 1 if gpus else max(1, len(os.sched_getaffinity(0)) // ranks)
    own.setdefault("OMP_NUM_THREADS", str(threads))
    own.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = own.get("MIRAGE_PORT") or "0"
    if not (given.isdecimal() and int(given) < PORTS_END):
        raise UserError(f"MIRAGE_PORT={given}: give a port below {PORTS_END}; the guards have the next one")
    port = free_ports(int(given))
    job = Job(own.get("MIRAGE_JOB") or f"here-{port}", port, options=tuple(own.get("MIRAGE_GUARD", "").split()))
    logs = ["--logs", own["MIRAGE_LOGS"]] if own.get("MIRAGE_LOGS") else []
    if ranks > 1:
        words = job.through_deepspeed(this_machine(ranks, gpus), module, logs)
        own.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        # There is nothing to launch.
        own.update(Place(0, 1, 0, job.master, port).variables())
        guard = [sys.executable, "-m", "mirage_ds.cluster.guard", *job.guard(), *logs]
        words = ["--master", job.master, *job.guard(), *guard, *module]
    launch.command.main(words, standalone_mode=False)
