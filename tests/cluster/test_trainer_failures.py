"""What goes wrong in the real trainer's ranks: the verdict, the exit code and the stacks, one launcher a fault."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mirage_ds.cluster.guard.wire import EXIT_HANG

from .hosts import wait_until
from .jobs import START_S, Job, flags
from .slurm import Slurm


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
    settings = flags(
        model=nano,
        stage="sft",
        data_path=mixed,
        max_steps=8,
        num_workers=0,
        save_model_path=tmp_path / "job/model",
        global_batch_size=4,
        report_to="none",
        cache_dir=tmp_path / "cache",
    )
    words = [fault, *settings]
    job = Job(launcher, slurm.nodes[:2], 1, tmp_path / "job", words, module="tests.cluster.faulty", login=slurm.login)
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
