"""What goes wrong on a cluster, under every launcher: the job ends soon, says why last, and leaves nothing behind.

Each fault meets four jobs of the stub at once, one a launcher: on one host that loses power all four lose it. The
measured times are printed as the table of docs/launch.md.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from mirage_ds.cluster.guard.wire import EXIT_HANG
from mirage_ds.errors import EXIT_LOST, EXIT_STOPPED

from .hosts import Cluster, wait_until
from .jobs import LAUNCHERS, LIMIT_S, START_S, Job
from .slurm import Slurm


def start_all(cluster: Cluster, slurm: Slurm, folder: Path, *arguments: object) -> list[Job]:
    """Start one job a launcher on the last two hosts; the first is Slurm's login host, and launches."""
    words = ("--steps", 4000, "--seconds", 0.05, *arguments)
    return [
        Job(launcher, slurm.nodes[:2], 1, folder / launcher, ("--out", folder / launcher, *words), login=slurm.login)
        for launcher in LAUNCHERS
    ]


def all_end(jobs: list[Job], fault: str, code: int | None, last: str, step: int = 0) -> None:
    """Wait for every job's end, then judge all of them.

    Args:
        code: of every job; None for any but 0.
        last: what the last lines of every log say.
        step: the fault's own, from when on seconds count; 0 for a fault that has just been made.
    """
    met: dict[str, float] = {}
    ended: dict[str, float] = {}
    begun = time.monotonic()
    while len(ended) < len(jobs) and time.monotonic() - begun < LIMIT_S + (START_S if step else 0):
        now = time.monotonic()
        for job in jobs:
            if job.step() >= step:
                met.setdefault(job.launcher, now)
            if job.code() is not None:
                ended.setdefault(job.launcher, now)
        time.sleep(0.05)
    wrong = []
    for job in jobs:
        name = job.launcher
        if name not in ended:
            wrong.append(f"{name}: it hangs; it said\n{job.said()[-3000:]}")
            continue
        left, returned, seconds = job.left_behind(), job.code(), ended[name] - met.get(name, begun)
        print(f"| {fault} | {name} | {seconds:.0f} | {returned} | {len(left) or 'nothing'} |")
        if returned != code and not (code is None and returned):
            wrong.append(f"{name}: exit code {returned}, not {code}; it said\n{job.said()[-3000:]}")
        if seconds > LIMIT_S:
            wrong.append(f"{name}: {seconds:.0f} s")
        if last not in job.last_lines():
            wrong.append(f"{name}: its last lines do not say '{last}':\n{job.last_lines(12)}")
        wrong += [f"{name} has left behind {one}" for one in left]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    ("fault", "code", "last"),
    [
        ("raise", 1, "ended with exit code 1: RuntimeError: the disk of this rank is on fire"),
        ("exit", 7, "ended with exit code 7"),
        ("kill", 137, "was killed by SIGKILL"),
        ("stop", EXIT_HANG, "is stopped (SIGSTOP)"),
        ("sleep", EXIT_HANG, "was late: waits for data, step 9"),
        # Of the trainer below too.
        pytest.param("skip", EXIT_HANG, "went past a collective in which rank 0", marks=pytest.mark.slow),
    ],
)
def test_a_rank_fails(fault: str, code: int, last: str, cluster: Cluster, slurm: Slurm, tmp_path: Path) -> None:
    jobs = start_all(cluster, slurm, tmp_path, "--fault", fault, "--at", 9)
    all_end(jobs, fault, code, last, step=8)
    for job in jobs:
        assert f"rank 1 on {job.hosts[1].name}" in job.last_lines()


@pytest.mark.parametrize("whom", ["guard", "command"])
def test_the_launcher_is_killed(whom: str, slurm: Slurm, cluster: Cluster, tmp_path: Path) -> None:
    jobs = start_all(cluster, slurm, tmp_path)
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
    jobs = start_all(cluster, slurm, tmp_path)
    for job in jobs:
        job.wait_for_step(5)
    for job in jobs:
        job.signal_launcher(number)
    all_end(jobs, f"{number.name} at the launcher", EXIT_STOPPED, "stopped on request")
    for job in jobs:
        assert "saved step" in job.said()


@pytest.mark.parametrize(
    ("rank", "what"), [(1, "power"), (1, "cable"), (0, "power"), pytest.param(0, "cable", marks=pytest.mark.slow)]
)
def test_a_host_is_lost(rank: int, what: str, cluster: Cluster, slurm: Slurm, tmp_path: Path) -> None:
    jobs = start_all(cluster, slurm, tmp_path)
    for job in jobs:
        job.wait_for_step(5)
    lost = slurm.nodes[rank]
    # With rank 0's host these two lose their launcher as well: what is left must end all the same.
    gone = [job for job in jobs if rank == 0 and job.launcher in ("pdsh", "mpi")]
    if what == "power":
        lost.power_off()
    else:
        lost.cut_cable()
    try:
        for job in jobs:
            if job.launcher == "pods":
                job.processes = [job.processes[1 - rank]]
        survivors = [job for job in jobs if job not in gone]
        all_end(survivors, f"rank {rank}'s host loses its {what}", EXIT_LOST, "no sign of life")
        for job in gone:
            assert not job.left_behind(20)
    finally:
        if what == "power":
            lost.power_on()
        else:
            lost.mend_cable()


@pytest.mark.parametrize(
    ("fault", "launcher", "code", "last"),
    [
        ("kill", "pdsh", 137, "was killed by SIGKILL"),
        ("stop", "pods", EXIT_HANG, "is stopped (SIGSTOP)"),
        ("loader", "mpi", EXIT_HANG, "was late: waits for data, step 3"),
        ("skip", "slurm", EXIT_HANG, "went past a collective in which rank 0"),
    ],
)
def test_the_trainer_fails(
    fault: str, launcher: str, code: int, last: str, nano: Path, mixed: Path, slurm: Slurm, tmp_path: Path
) -> None:
    flags = (
        *(fault, "--model", nano, "--stage", "sft", "--data_path", mixed, "--max_steps", 8, "--num_workers", 0),
        *("--save_model_path", tmp_path / "job/model", "--global_batch_size", 4, "--report_to", "none"),
        *("--cache_dir", tmp_path / "cache"),
    )
    job = Job(
        *(launcher, slurm.nodes[:2], 1, tmp_path / "job", flags), module="tests.cluster.faulty", login=slurm.login
    )
    log = job.out / "model/run/log.jsonl"
    wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 2, f"step 2; it said {job.said()}", START_S)
    begun = time.monotonic()
    assert job.end() == code, job.said()
    print(f"| trainer: {fault} | {launcher} | {time.monotonic() - begun:.0f} | {code} | nothing |")
    assert last in job.last_lines(), job.said()
    assert f"rank 1 on {job.hosts[1].name}" in job.last_lines()
    assert not job.left_behind()
    assert json.loads((job.out / "model/run/faults.jsonl").read_text())["code"] == code
    if fault in ("loader", "skip"):
        stacks = [(job.out / f"model/run/stacks/rank{rank}.txt").read_text() for rank in (0, 1)]
        assert "all_reduce" in stacks[0] or "mirage_ds/run/step.py" in stacks[0]
        assert ('faulty.py", line' in stacks[1] and " in late" in stacks[1]) == (fault == "loader")
