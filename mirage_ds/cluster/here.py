"""Ranks on this machine: which GPUs there are, and DeepSpeed's launcher under its guards.

Imports no torch.
"""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from mirage_ds.errors import UserError

# Below the ports that Linux gives to connections by itself: one of those may be taken before the job listens.
PORTS = range(15_000, 32_000)


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
        raise UserError(f"nvidia-smi fails and says: {said[0]}; fix the driver, or set DS_ACCELERATOR=cpu")
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]


def free_ports(wanted: int = 0) -> int:
    """Return a port of two neighbours that nobody listens on: of the ranks, and of their guards.

    Args:
        wanted: the port to look at; 0 for any.

    Raises:
        UserError: somebody listens on the port that is wanted, or on the next.
    """
    while True:
        with socket.socket() as first, socket.socket() as second:
            for one in (first, second):
                # As torch and the guards do: what a job before has just closed is free.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, bool(wanted))
            port = wanted or secrets.choice(PORTS)
            try:
                first.bind(("", port))
                second.bind(("", port + 1))
            except (OSError, OverflowError) as error:
                if wanted:
                    what = f"this port or the next cannot be listened on ({error})"
                    raise UserError(f"MIRAGE_PORT={wanted}: {what}; give another, or leave it out") from None
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
        quiet = ["--log_level", os.environ.get("MIRAGE_LOG_LEVEL", "critical").lower()]
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
