"""Which rank a process is, and how it leaves: nothing that goes wrong afterwards changes its code or what it said."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mirage_ds.engine.place import is_rank
from mirage_ds.errors import EXIT_STOPPED, UserError
from mirage_ds.run.process import run_rank

# What gloo's threads do to a process whose interpreter is being taken down, made certain.
PROGRAM = """
import atexit, os, sys
import click
from mirage_ds.run.process import run_rank
from mirage_ds.errors import UserError
from mirage_ds.errors import Stopped

class Thread:
    def __del__(self, abort=os.abort): abort()

sys.modules["lives_as_long_as_the_interpreter"] = Thread()
atexit.register(print, "handler")

@click.command()
@click.argument("ends")
def command(ends):
    print("said", end=" ")
    if ends == "stop": raise Stopped
    if ends == "mistake": raise UserError("a mistake")
    if ends == "full": raise OSError(28, "No space left on device", "there/x")

run_rank(command)
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("well", 0, "said handler\n"),
        ("stop", EXIT_STOPPED, "said handler\n"),
        ("mistake", 2, "said "),
        ("full", 2, "said "),
    ],
)
def test_an_end_is_the_end_whatever_the_interpreter_does_after_it(ends: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, ends], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == said
    full = "error: there/x: No space left on device; make room there, and start again\n"
    assert done.stderr == {"stop": "stopped\n", "mistake": "error: a mistake\n", "full": full}.get(ends, "")


MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        (RANK | MEETING, True),
        (RANK | MEETING | SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, True),
        ({}, False),
        (MEETING, False),
        ({"WORLD_SIZE": "1"}, False),
        # After salloc: the job has two tasks, this shell is none of them.
        (SRUN, False),
        # The same where salloc makes its shell a step of its own.
        (SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, False),
        # A batch script.
        (SRUN | {"SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, False),
        # srun --ntasks 1, `srun --pty bash`.
        (SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, False),
        # One process of mpirun in a job of two tasks.
        (SRUN | MPIRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, False),
    ],
)
def test_a_process_is_a_rank_or_alone(environment: dict[str, str], rank: bool) -> None:
    assert is_rank(environment) is rank


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        (SRUN | {"SLURM_PROCID": "0"}, ["srun started 2 tasks", "RANK is not set", "launch/slurm.sbatch", "torchrun"]),
        (SRUN | {"SLURM_PROCID": "1"}, ["srun started 2 tasks"]),
        # A batch script's own srun: the script's ENVIRONMENT comes along.
        (SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"}, ["srun started 2 tasks"]),
        ({"SLURM_PROCID": "0", "SLURM_NPROCS": "4", "SLURM_STEP_ID": "0"}, ["srun started 4 tasks"]),
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "2"}, ["mpirun started 2 tasks", "launch/mpi.sh"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "8"}, ["mpiexec or srun started 8 tasks", "launch/mpi.sh"]),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "8"}, ["mpirun started 8 tasks"]),
        ({"PMIX_RANK": "3"}, ["PMIX_RANK=3"]),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2"}, ["flux started 2 tasks"]),
        ({"RANK": "0"}, ["WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set, beside RANK"]),
        (
            {"RANK": "0", "WORLD_SIZE": "1"},
            ["LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set, beside RANK and WORLD_SIZE"],
        ),
        (RANK, ["MASTER_ADDR, MASTER_PORT not set"]),
        (RANK | MEETING | {"LOCAL_RANK": ""}, ["LOCAL_RANK not set"]),
        (RANK | {"MASTER_ADDR": "node1"}, ["MASTER_PORT not set"]),
        ({"WORLD_SIZE": "2"} | MEETING, ["RANK, LOCAL_RANK not set, beside WORLD_SIZE"]),
        (RANK | MEETING | {"RANK": "2"}, ["RANK is '2'", "from 0 to 1"]),
        (RANK | MEETING | {"RANK": "-1"}, ["RANK is '-1'"]),
        (RANK | MEETING | {"RANK": "one"}, ["RANK is 'one'"]),
        (RANK | MEETING | {"WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'"]),
        (RANK | MEETING | {"LOCAL_RANK": "2"}, ["LOCAL_RANK is '2'"]),
        (RANK | MEETING | {"MASTER_PORT": "http"}, ["MASTER_PORT is 'http'"]),
        (RANK | MEETING | {"MASTER_PORT": "65536"}, ["MASTER_PORT is '65536'"]),
    ],
)
def test_a_task_that_knows_nothing_of_the_others_is_refused(environment: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        is_rank(environment)
    assert all(part in str(refused.value) for part in parts), refused.value
    # Each says it: the one that other ranks leave it to may not exist.
    assert not refused.value.everywhere


def test_both_modules_that_launchers_start_ask_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mirage_ds import train
    from mirage_ds.evaluate.command import evaluate

    for name, value in (SRUN | {"SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    out = tmp_path / "out"
    training = ["--model", "m", "--stage", "sft", "--data_path", "d", "--save_model_path", str(out)]
    for command, words in ((train.command, training), (evaluate, ["m", "--data_path", "d"])):
        with pytest.raises(UserError, match="srun started 2 tasks"):
            command.main(words, standalone_mode=False)
    assert not out.exists()


def _main(module: str) -> Callable[[], None]:
    found = importlib.import_module(f"mirage_ds.{module}")
    # As a module's last line starts it.
    return found.main if hasattr(found, "main") else partial(run_rank, found.command, alone=True)


@pytest.mark.parametrize(
    "module", ["cli", "train", "evaluate.command", "cluster.guard.__main__", "cluster.hosts", "cluster.environment"]
)
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_is_not_utf8_ends_nothing(
    module: str, encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(os, "_exit", sys.exit)
    # They are this whole suite's: torch has some that take its operators away.
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "hosts") if module == "cluster.hosts" else "--help"])
    with contextlib.suppress(SystemExit):
        _main(module)()
    print("578\u2013863 rows")
    terminal.flush()
    assert written.getvalue().endswith(b"578?863 rows\n")
    assert b"Show this message" in written.getvalue() or module == "cluster.hosts"


def test_the_log_file_is_utf8_whatever_the_terminal_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mirage_ds.run.journal import Journal, Logs

    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="replace")
    monkeypatch.setattr(sys, "stdout", terminal)
    journal, logs = Journal(), Logs(tmp_path / "run", 1, [], tmp_path / "log.txt")
    with journal.logging(logs):
        journal.say("578\u2013863 tokens")
        assert logs.text is not None
        assert logs.text.encoding == logs.lines.encoding == "utf-8"
    assert "578\u2013863".encode() in (tmp_path / "log.txt").read_bytes()
