"""The hosts of a job and the way to them: a hostfile over ssh, a Slurm job by srun, or this machine alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mirage_ds.cluster.doctor import transport
from mirage_ds.cluster.doctor.finding import Launcher
from mirage_ds.cluster.environment import launcher_files, lint, parse, read
from mirage_ds.cluster.hosts import Host, read_hosts
from mirage_ds.errors import UserError


class Job(NamedTuple):
    """Where ranks will run.

    Attributes:
        hosts: in the order of ranks; slots are 0 where only the host can say how many GPUs it has.
        env_files: DeepSpeed's environment files: path → text.
    """

    launcher: Launcher
    hosts: tuple[Host, ...]
    reach: transport.Reach
    env_files: Mapping[Path, str]


def _slots(tasks: str, count: int) -> list[int]:
    """Read Slurm's `2(x3),1`: 2, 2, 2, 1."""
    found: list[int] = []
    for part in filter(None, tasks.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_TASKS_PER_NODE is {tasks!r}, which Slurm would not write; unset it")
        found += [int(match[1])] * int(match[2] or 1)
    return found if len(found) == count else [0] * count


def slurm_hosts(environment: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the nodes of the Slurm job that this runs in, with the job's tasks a node as slots.

    Raises:
        UserError: not in a job.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("--slurm: not inside a Slurm job; call it in the job's script, or after salloc")
    if not (shutil.which("scontrol") and shutil.which("srun")):
        raise UserError("--slurm: scontrol or srun is not on PATH; call it where Slurm's commands are installed")
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"--slurm: scontrol cannot read SLURM_JOB_NODELIST={nodes} ({listed.stderr.strip()})")
    names = listed.stdout.split()
    tasks = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    slots = [int(tasks)] * len(names) if tasks.isdecimal() else _slots(tasks, len(names))
    return tuple(map(Host, names, slots))


def find_job(hostfile: Path | None, slurm: bool, environment: Mapping[str, str]) -> Job:
    """Return the job's hosts and how to reach them.

    Raises:
        UserError: a faulty hostfile, no Slurm job, or both asked for.
    """
    if hostfile and slurm:
        raise UserError("--hostfile and --slurm both say which hosts: give one of them")
    if slurm:
        return Job("slurm", slurm_hosts(environment), transport.slurm, {})
    if not hostfile:
        return Job("local", (Host("localhost", 0),), transport.local, {})
    if not shutil.which("ssh"):
        raise UserError("--hostfile: ssh is not on PATH; install the OpenSSH client")
    hosts = read_hosts(hostfile)
    files = {file: read(file) for file in launcher_files(environment, Path.home(), Path.cwd())}
    lines: dict[str, str] = {}
    for text in files.values():
        broken = {fault.line for fault in lint(text) if fault.fatal}
        # A faulty line is the check's to tell; with it the hosts could not be asked anything.
        sound = [line for number, line in enumerate(text.splitlines(), 1) if number not in broken]
        lines |= parse("\n".join(sound))
    # DeepSpeed asks torch whether the launching machine has GPUs.
    gpus = environment.get("DS_ACCELERATOR") != "cpu" and shutil.which("nvidia-smi") is not None
    return Job("pdsh", hosts, transport.ssh(transport.exports(environment, os.getcwd(), gpus, lines)), files)
