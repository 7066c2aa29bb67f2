"""What goes wrong on a cluster, under every launcher: the job ends soon, says why last, and leaves nothing behind.

Each fault meets four jobs of the stub at once, one a launcher: on one host that loses power all four lose it. The
measured times are printed as the table of docs/launch.md.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from mirage_ds.cluster.guard.wire import EXIT_HANG
from mirage_ds.errors import EXIT_STOPPED

from .hosts import Cluster
from .jobs import LIMIT_S, all_end, start_all
from .slurm import Slurm


@pytest.mark.parametrize(
    ("fault", "code", "last"),
    [
        ("raise", 1, "ended with exit code 1: RuntimeError: the disk of this rank is on fire"),
        ("exit", 7, "ended with exit code 7"),
        ("kill", 137, "was killed by SIGKILL"),
        ("stop", EXIT_HANG, "is stopped (SIGSTOP)"),
        ("sleep", EXIT_HANG, "was late: waits for data, step 9"),
        # Of the trainer too: test_trainer_failures.py.
        ("skip", EXIT_HANG, "went past a collective in which rank 0"),
    ],
)
def test_a_rank_fails(fault: str, code: int, last: str, cluster: Cluster, slurm: Slurm, tmp_path: Path) -> None:
    jobs = start_all(slurm, tmp_path, "--fault", fault, "--at", 9)
    all_end(jobs, fault, code, last, step=8)
    for job in jobs:
        assert f"rank 1 on {job.hosts[1].name}" in job.last_lines()


@pytest.mark.parametrize("whom", ["guard", "command"])
def test_the_launcher_is_killed(whom: str, slurm: Slurm, cluster: Cluster, tmp_path: Path) -> None:
    jobs = start_all(slurm, tmp_path)
    for job in jobs:
        job.wait_for_step(5)
    for job in jobs:
        (job.launch_guard() if whom == "guard" else job.launch_command()).kill()
    begun = time.monotonic()
    for job in jobs:
        # The launching command is gone at once: what counts is how long the ranks outlive it.
        assert job.end() != 0
        assert not job.left_behind(LIMIT_S), job.launcher
        seconds = time.monotonic() - begun
        print(f"| the launcher's {whom} is killed with -9 | {job.launcher} | {seconds:.0f} | – | nothing |")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_launcher_is_signalled(number: signal.Signals, cluster: Cluster, slurm: Slurm, tmp_path: Path) -> None:
    jobs = start_all(slurm, tmp_path)
    for job in jobs:
        job.wait_for_step(5)
    for job in jobs:
        job.signal_launcher(number)
    all_end(jobs, f"{number.name} at the launcher", EXIT_STOPPED, "stopped on request")
    for job in jobs:
        assert "saved step" in job.said()
