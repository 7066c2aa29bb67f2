"""Requests to stop, through the real launcher with two ranks and workers: saved, left together, continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mirage_ds.cluster.here import free_ports

LIMIT_S = 120
REPO = Path(__file__).parents[2]
# A step of nano takes a fifth of a second: it is not over before it is asked to stop.
STEPS = 400


class Job:
    """A launched training run."""

    def __init__(self, out: Path, model: Path, data: Path):
        binaries = Path(sys.executable).parent
        command = [
            *(binaries / "deepspeed", "--num_accelerators", 2, "--master_port", free_ports()),
            *("--module", "mirage_ds.train", "--resume", "auto", "--stage", "sft", "--global_batch_size", 4),
            *("--model", model, "--data_path", data, "--save_model_path", out, "--report_to", "none"),
            *("--epochs", STEPS, "--max_steps", STEPS, "--num_workers", 1),
        ]
        environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        self.out = out
        self.process = subprocess.Popen(
            [str(word) for word in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def steps(self) -> list[int]:
        log = self.out / "run/log.jsonl"
        return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.is_file() else []

    def rank(self, number: int) -> int:
        """Process id of a rank: it is not a worker, whose parent is a rank."""
        for folder in Path("/proc").iterdir():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (folder / "cmdline").read_bytes()
                launcher = (Path("/proc") / str(parent) / "cmdline").read_bytes()
            except (OSError, ValueError, IndexError):
                continue
            is_rank = b"deepspeed.launcher.launch" in launcher and f"RANK={number}".encode() in variables
            if is_rank and str(self.out).encode() in words:
                return int(folder.name)
        raise AssertionError(f"no rank {number}")

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + LIMIT_S
        while step not in self.steps():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, said


def by_file(job: Job) -> None:
    (job.out / "run/stop").touch()


def to_all(job: Job) -> None:
    """As a scheduler does: every process of the job but the launchers, workers too."""
    for rank in (0, 1):
        pid = job.rank(rank)
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        for one in (*children, pid):
            os.kill(one, signal.SIGTERM)


def to_launcher(job: Job) -> None:
    """To the process that has started the ranks of this machine; it ends them one after another."""
    status = Path(f"/proc/{job.rank(0)}/stat").read_text()
    os.kill(int(status.rsplit(")", 1)[1].split()[1]), signal.SIGTERM)


# The launcher has its own code once it is signalled. Where one rank alone is asked: tests/dist/test_reliability.py.
WAYS: tuple[tuple[str, Callable[[Job], None], int], ...] = (
    ("stop file", by_file, 75),
    ("SIGTERM to every rank and worker", to_all, 75),
    ("SIGTERM to the launcher", to_launcher, 1),
)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(nano: Path, mixed: Path, tmp_path: Path) -> None:
    """One run, stopped in one way after another; each start goes on where the one before has stopped."""
    out, last = tmp_path / "out", 0
    for way, ask, code in WAYS:
        job = Job(out, nano, mixed)
        job.wait_for_step(last + 3)
        asked = time.monotonic()
        ask(job)
        returned, said = job.end()
        seconds = time.monotonic() - asked
        assert returned == code, f"{way}: {said}"
        assert "Traceback" not in said, f"{way}: {said}"
        last = job.steps()[-1]
        assert job.steps() == list(range(1, last + 1)), way
        assert f"stopped on request after step {last}; the same command with --resume auto goes on" in said, way
        assert (out / "run/checkpoints/latest").read_text() == f"global_step{last}", way
        assert not (out / "config.json").exists(), way
        # One step, one save, the launcher's look at its ranks once a second; idle cores would need 2 s.
        assert seconds < 30, way
        print(f"{way}: {seconds:.1f} s from the request to the end of the job")


def run_command(*words: object, code: str = "") -> subprocess.Popen[str]:
    """Start `mirage-ds`, after `code` in the same process."""
    program = f"{code}\nfrom mirage_ds.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# The process that works asks itself: at a moment that no test could hit from outside.
AFTER_A_BATCH = """
import os, signal
from mirage_ds.evaluate import report as evaluate
whole = evaluate.answer_records
def one(*words, **more):
    found = whole(*words, **more)
    os.kill(os.getpid(), signal.SIGTERM)
    return found
evaluate.answer_records = one
"""
IN_A_WRITE = """
import os, signal
from mirage_ds.model import shards
whole = shards.save_file
def half(tensors, path, **more):
    whole(tensors, path, **more)
    os.kill(os.getpid(), signal.SIGUSR1)
shards.save_file = half
"""


@pytest.mark.slow
def test_evaluate_stops_at_once_and_writes_no_scores(nano: Path, mixed: Path, tmp_path: Path) -> None:
    words = (
        "evaluate",
        nano,
        "--data_path",
        REPO / "data/sample_planning.jsonl",
        "--no_latents",
        "--max_new_tokens",
        4,
    )
    stopped = run_command(*words, "--batch_size", 4, "--out", tmp_path / "scores.json", code=AFTER_A_BATCH)
    _, said = stopped.communicate(timeout=LIMIT_S)
    assert (stopped.returncode, said.splitlines()[-1]) == (75, "stopped")
    assert list(tmp_path.iterdir()) == []
    whole = run_command(*words, "--out", tmp_path / "scores.json")
    whole.communicate(timeout=LIMIT_S)
    assert (whole.returncode, [file.name for file in tmp_path.iterdir()]) == (0, ["scores.json"])


@pytest.mark.slow
def test_export_stops_at_once_and_leaves_no_folder(nano: Path, tmp_path: Path) -> None:
    words = ("export", nano, tmp_path / "out", "--vocab_rows", 700)
    stopped = run_command(*words, code=IN_A_WRITE)
    _, said = stopped.communicate(timeout=LIMIT_S)
    assert (stopped.returncode, said.splitlines()[-1]) == (75, "stopped")
    assert list(tmp_path.iterdir()) == []
    whole = run_command(*words)
    whole.communicate(timeout=LIMIT_S)
    assert (whole.returncode, (tmp_path / "out/model.safetensors").is_file()) == (0, True)
