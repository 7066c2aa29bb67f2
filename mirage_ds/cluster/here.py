"""Ranks on this machine: which GPUs there are, DeepSpeed's launcher under its guards, and `mirage-ds train`.

Imports no torch.
"""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import click

from mirage_ds.cluster.guard import launch
from mirage_ds.config.flags import CONTEXT, RunCommand, run_config, run_options
from mirage_ds.engine.place import Place, is_rank
from mirage_ds.errors import UserError

# Where there is no GPU. One would show nothing of what several ranks do.
CPU_RANKS = 2
WORDS = f"{__name__}.words"


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Name the GPUs that processes with this environment may use; none where they are told to use the CPU.

    Raises:
        UserError: there is a driver, and it fails.
    """
    if environment.get("DS_ACCELERATOR") == "cpu":
        return []
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        # As CUDA has it, what stands behind a number below 0 is not seen.
        return list(takewhile(lambda name: not name.startswith("-"), names))
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    if listed.returncode:
        said = (listed.stdout + listed.stderr).strip().splitlines() or ["nothing"]
        raise UserError(f"nvidia-smi fails and says: {said[0]}; mend the driver, or set DS_ACCELERATOR=cpu")
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]


def free_ports() -> int:
    """Return a port of two neighbours that nobody listens on: of the ranks, and of their guards."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Job(NamedTuple):
    """How the ranks and the guards of a job find each other.

    Attributes:
        master: rank 0's host.
        port: of the ranks; the guards have the next one.
        options: of the guards.
    """

    name: str
    port: int
    master: str = "127.0.0.1"
    options: tuple[str, ...] = ()

    def guard(self) -> list[str]:
        """Return the flags of each of its guards."""
        return ["--port", str(self.port + 1), "--job", self.name, *self.options]

    def through_deepspeed(self, where: Sequence[str], module: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        """Return the arguments of the guard around DeepSpeed's launcher, which starts a module under guards.

        Args:
            where: flags of the launcher: its hosts and GPUs.
            module: the module and its arguments; options: of the ranks' guards alone.
        """
        # Of a failure the guards say more.
        quiet = ["--log_level", os.environ.get("MIRAGE_LOG_LEVEL", "critical")]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *where, *quiet, "--no_local_rank"]
        meeting = ["--master_addr", self.master, "--master_port", str(self.port)]
        ranks = ["--module", "mirage_ds.cluster.guard", *self.guard(), *options, *module]
        return ["--master", self.master, *self.guard(), *launcher, *meeting, *ranks]


def this_machine(ranks: int, gpus: Sequence[str] | None) -> list[str]:
    """Return the launcher's flags for ranks on this machine.

    It ignores CUDA_VISIBLE_DEVICES where it is told how many ranks there are.

    Args:
        gpus: by their numbers, one a rank; None for ranks without one.

    Raises:
        UserError: a GPU has no number.
    """
    here = ["--hostfile", "/nonexistent"]
    if not gpus:
        return [*here, "--num_accelerators", str(ranks)]
    if not all(name.isdecimal() for name in gpus):
        named = ",".join(gpus)
        raise UserError(f"CUDA_VISIBLE_DEVICES={named}: DeepSpeed's launcher knows GPUs by number; write 0,1 and so on")
    return [*here, "--include", f"localhost:{','.join(gpus[:ranks])}"]


class _Train(RunCommand):
    """Keeps its words, which the ranks get as they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does."""
        ctx.meta[WORDS] = tuple(args)
        return super().parse_args(ctx, args)


@click.command(cls=_Train, context_settings=CONTEXT)
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
    port = int(own.get("MIRAGE_PORT") or free_ports())
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
