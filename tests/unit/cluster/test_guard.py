"""The guards around ranks of one machine; what they do across hosts and under real launchers is in tests/cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from mirage_ds.cluster.guard.watch import die_with
from mirage_ds.cluster.guard.wire import EXIT_HANG
from mirage_ds.cluster.here import free_ports
from mirage_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR

ROOT = Path(__file__).parents[3]
BOUNDS = ("--gather", "15", "--silence", "4", "--start", "15", "--hang", "3", "--grace", "1")
LIMIT_S = 30


class Ranks:
    """Ranks of the stub, each under its guard, all under a guard for the launcher, which a shell plays."""

    def __init__(self, out: Path, *arguments: str, size: int = 2, alone: tuple[str, ...] = ()):
        self.out = out
        out.mkdir()
        master_port = free_ports()
        port = master_port + 1
        guard = (
            sys.executable,
            "-m",
            "mirage_ds.cluster.guard",
            "--port",
            str(port),
            *BOUNDS,
            "--logs",
            str(out / "logs"),
        )
        stub = ("tests.cluster.stub", "--out", str(out), "--steps", "40", *arguments)
        lines = [
            " ".join(f"'{word}'" for word in ("env", f"RANK={n}", f"LOCAL_RANK={n}", *(alone or (*guard, *stub))))
            + ' & p="$p $!"'
            for n in range(size)
        ]
        # As launchers do: the code is that of a rank that failed.
        script = "\n".join([*lines, "c=0; for i in $p; do wait $i || c=$?; done; exit $c"])
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mirage_ds.cluster.guard.launch",
                "--master",
                "127.0.0.1",
                "--port",
                str(port),
                *BOUNDS,
                "bash",
                "-c",
                script,
            ],
            env=kept | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(master_port)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started = time.monotonic()

    def wait_for_step(self, step: int) -> None:
        file = self.out / "step"
        while not (file.is_file() and int(file.read_text() or 0) >= step):
            assert time.monotonic() < self.started + LIMIT_S
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def guard_of(self, rank: int) -> psutil.Process:
        return next(
            one
            for one in self.family()
            if "mirage_ds.cluster.guard" in one.cmdline()
            and "-u" not in one.cmdline()
            and one.environ().get("RANK") == str(rank)
        )

    def rank(self, rank: int) -> psutil.Process:
        return self.guard_of(rank).children()[0]

    def end(self, family: list[psutil.Process] | None = None) -> tuple[int, list[str]]:
        said, _ = self.process.communicate(timeout=LIMIT_S)
        deadline = time.monotonic() + LIMIT_S
        mine = [one for one in psutil.process_iter(["cmdline"]) if str(self.out) in (one.info["cmdline"] or [])]
        while any(one.is_running() for one in mine) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [one for one in mine if one.is_running()]
        return self.process.returncode, said.splitlines()


def test_a_run_without_faults_ends_with_0(tmp_path: Path) -> None:
    code, said = Ranks(tmp_path / "out").end()
    assert code == 0
    assert "step 40" in said
    assert not [line for line in said if line.startswith("guard:")]
    assert "step 40" in (tmp_path / "out/logs/rank0.log").read_text()


@pytest.mark.parametrize(
    ("fault", "code", "last"),
    [
        ("raise", 1, "ended with exit code 1: RuntimeError: the disk of this rank is on fire"),
        ("kill", 137, "was killed by SIGKILL (the kernel, when memory runs out, or somebody)"),
        ("sleep", EXIT_HANG, "was late: waits for data, step 5, waits for"),
        ("skip", EXIT_HANG, "went past a collective in which rank 0"),
    ],
)
def test_a_fault_of_one_rank_ends_the_job_and_is_named(fault: str, code: int, last: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    returned, said = Ranks(out, "--fault", fault).end()
    assert returned == code, said
    assert said[-1].startswith("guard: rank 1 on ")
    assert last in said[-1], said
    faults = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    assert [(one["code"], one["why"][-1]) for one in faults] == [(code, said[-1].removeprefix("guard: "))]
    if fault in ("sleep", "skip"):
        assert "stub.py" in (out / "stacks/rank1.txt").read_text()
        assert "exchange" in (out / "stacks/rank0.txt").read_text()


def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "out", "--steps", "60")
    ranks.wait_for_step(5)
    # As Ctrl-Z and fg do. Longer than a guard may be silent.
    family = [psutil.Process(ranks.process.pid), *ranks.family()]
    for one in family:
        one.suspend()
    time.sleep(5)
    for one in reversed(family):
        one.resume()
    code, said = ranks.end()
    assert (code, [line for line in said if line.startswith("guard:")]) == (0, [])


def test_a_guard_that_is_killed_takes_its_rank_along_and_ends_the_job(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "out", "--steps", "4000")
    ranks.wait_for_step(5)
    ranks.guard_of(1).kill()
    code, said = ranks.end()
    assert code == EXIT_LOST
    assert said[-1].endswith("lost its guard, which was killed")


def alone(port: int, job: str, module: str = "nothing", **place: object) -> subprocess.Popen[str]:
    """One guard, as a launcher starts it."""
    words = [sys.executable, "-m", "mirage_ds.cluster.guard", "--port", str(port), "--job", job, *BOUNDS, module]
    variables = {key.upper(): str(value) for key, value in place.items()}
    return subprocess.Popen(
        words, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("parent", "code"), [(os.getpid(), 0), (os.getpid() + 1, 1)], ids=["there", "gone"])
def test_a_rank_is_not_started_by_a_guard_that_has_ended(parent: int, code: int, tmp_path: Path) -> None:
    # Whose parent died between the fork and the request to die with it, the kernel tells nobody.
    begun = tmp_path / "begun"
    child = subprocess.Popen(["touch", begun], preexec_fn=partial(die_with, parent))  # noqa: PLW1509  # no threads
    assert child.wait(LIMIT_S) == code
    assert begun.exists() == (code == 0)


def test_a_taken_port_and_another_jobs_port_are_one_sentence(tmp_path: Path) -> None:
    master_port = free_ports()
    port = master_port + 1
    place = dict(world_size=2, local_rank=0, master_addr="127.0.0.1", master_port=master_port)
    with socket.create_server(("", port)):
        taken = alone(port, "mine", rank=0, **place)
        _, said = taken.communicate(timeout=LIMIT_S)
    assert taken.returncode == 2
    why = "(Address already in use); another job on this host has it: choose another --port"
    assert said == f"error: port {port} for the guards cannot be opened {why}\n"
    ranks = Ranks(tmp_path / "out", "--steps", "4000")
    ranks.wait_for_step(1)
    port = int(ranks.process.args[6])  # type: ignore[index]
    stranger = alone(port, "mine", rank=1, **place)
    _, said = stranger.communicate(timeout=LIMIT_S)
    assert stranger.returncode == 2
    assert "this port belongs to job mirage-ds, not to mine; choose another --port" in said
    ranks.process.terminate()
    assert ranks.end()[0] == 75


def test_a_rank_that_is_asked_to_stop_while_it_still_imports_has_stopped(tmp_path: Path) -> None:
    master_port = free_ports()
    port = master_port + 1
    (tmp_path / "dozer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(100)\n")
    place = dict(rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=master_port)
    started = alone(port, "mine", module="dozer", pythonpath=f"{tmp_path}{os.pathsep}{ROOT}", **place)
    assert started.stdout is not None
    assert started.stdout.readline() == "importing\n"
    started.terminate()
    _, said = started.communicate(timeout=LIMIT_S)
    assert (started.returncode, said) == (75, "guard: stopped on request\n")


def test_a_guard_of_any_rank_says_what_is_wrong_with_its_command() -> None:
    environment = {**os.environ, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    command = [sys.executable, "-m", "mirage_ds.cluster.guard", "--nonsense", "3", "x"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr[:7]) == (2, "error: ")


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_any_rank_is_there_is_one_line(asked: int) -> None:
    """A launcher that takes its time, and a hub that nobody has opened yet."""
    port = free_ports()
    guard = [sys.executable, "-m", "mirage_ds.cluster.guard.launch", "--master", "127.0.0.1", "--port", str(port)]
    program = "import time; print('there', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [*guard, *BOUNDS, sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(asked)
        _, told = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, told) == (EXIT_STOPPED, "guard: stopped on request\n")


def test_the_cause_is_told_once_on_a_host_and_a_user_s_error_by_the_rank_alone(tmp_path: Path) -> None:
    _, said = Ranks(tmp_path / "out", "--fault", "raise").end()
    assert len([line for line in said if line.startswith("guard: rank 1 ")]) == 1
    code, said = Ranks(tmp_path / "other", "--fault", "user").end()
    assert code == EXIT_USER_ERROR
    assert [line for line in said if "error: " in line or "guard: " in line] == ["error: a mistake"]
