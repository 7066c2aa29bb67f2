"""The guards around ranks of one machine; what they do across hosts and under real launchers is in tests/cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mirage_ds.guard.wire import EXIT_HANG

ROOT = Path(__file__).parents[2]
BOUNDS = ("--gather", "15", "--silence", "4", "--start", "15", "--hang", "3", "--grace", "1")
LIMIT_S = 30


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Ranks:
    """Ranks of the stub, each under its guard, all under a guard for the launcher, which a shell plays."""

    def __init__(self, out: Path, *arguments: str, size: int = 2, alone: tuple[str, ...] = ()):
        self.out = out
        out.mkdir()
        port, master_port = free_ports(2)
        guard = (sys.executable, "-m", "mirage_ds.guard", "--port", str(port), *BOUNDS, "--logs", str(out / "logs"))
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
                *(
                    sys.executable,
                    "-m",
                    "mirage_ds.guard.launch",
                    "--master",
                    "127.0.0.1",
                    "--port",
                    str(port),
                    *BOUNDS,
                ),
                *("bash", "-c", script),
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
            if "mirage_ds.guard" in one.cmdline()
            and "-u" not in one.cmdline()
            and one.environ().get("RANK") == str(rank)
        )

    def rank(self, rank: int) -> psutil.Process:
        return self.guard_of(rank).children()[0]

    def end(self, family: list[psutil.Process] | None = None) -> tuple[int, list[str]]:
        said, _ = self.process.communicate(timeout=LIMIT_S)
        deadline = time.monotonic() + 5
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
        ("exit", 7, "ended with exit code 7 and said nothing"),
        ("kill", 137, "was killed by SIGKILL (the kernel, when memory runs out, or somebody)"),
        ("stop", EXIT_HANG, "is stopped (SIGSTOP); the others wait for it"),
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
