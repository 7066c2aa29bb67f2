"""`mirage-ds train`: what it refuses before any rank starts, and what it starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from mirage_ds.cluster import train as here
from mirage_ds.cluster.here import this_machine, visible_gpus
from mirage_ds.errors import EXIT_STOPPED, UserError


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An `nvidia-smi` alone on the path."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("given", "found"), [("4,5", ["4", "5"]), ("GPU-1a, GPU-2b", ["GPU-1a", "GPU-2b"]), ("", []), ("-1", [])]
)
def test_gpus_that_this_process_was_given(given: str, found: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": given}) == found
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": given, "DS_ACCELERATOR": "cpu"}) == []


def test_gpus_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "echo 'GPU 0: A'; echo 'GPU 1: A'")
    assert visible_gpus({}) == ["0", "1"]
    smi(tmp_path, monkeypatch, "echo 'Failed to initialize NVML'; exit 18")
    with pytest.raises(UserError, match="says: Failed to initialize NVML; fix"):
        visible_gpus({})
    (tmp_path / "nvidia-smi").unlink()
    assert visible_gpus({}) == []


def test_what_the_launcher_is_told() -> None:
    assert this_machine(2, None)[-2:] == ["--num_accelerators", "2"]
    assert this_machine(2, ["4", "6", "7"])[-2:] == ["--include", "localhost:4,6"]
    with pytest.raises(UserError, match="GPUs by number"):
        this_machine(2, ["GPU-1a", "GPU-2b"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been started. The environment is put back: the command changes its own."""
    found: list[list[str]] = []
    monkeypatch.setattr(here.launch.command, "main", lambda words, **_: found.append(words))
    monkeypatch.setattr(here.os, "environ", {"DS_ACCELERATOR": "cpu", "PATH": os.environ["PATH"]})
    return found


def settings(nano: Path, mixed: Path, out: Path, *more: str) -> list[str]:
    own = ["--model", str(nano), "--stage", "sft", "--data_path", str(mixed), "--save_model_path", str(out)]
    return [*own, *more]


def test_every_flag_is_passed_on_and_the_line_for_hosts_is_shown(
    nano: Path, mixed: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(nano, mixed, tmp_path / "a b", "--max-steps", "3", "--no_train_vision")
    here.train.main([*words, "--ranks", "3"], standalone_mode=False)
    here.train.main([*words, "--ranks=1"], standalone_mode=False)
    three, one = started
    assert three[-len(words) - 1 :] == one[-len(words) - 1 :] == ["mirage_ds.train", *words]
    assert three[three.index("--num_accelerators") + 1] == "3"
    # One rank needs no launcher.
    assert "deepspeed.launcher.runner" not in one
    assert here.os.environ["WORLD_SIZE"] == "1"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("3 rank(s) on the CPU")
    assert said[1].startswith("on several hosts: launch/deepspeed.sh HOSTFILE --model ")
    assert said[1].endswith(f"--save_model_path '{tmp_path}/a b' --max-steps 3 --no_train_vision")


REFUSED = {
    "No such option: --output_dir; here it is --save_model_path": ["--output_dir", "x"],
    "No such option: --num_gpus; here it is --ranks": ["--num_gpus", "2"],
    "9 ranks: use fewer": ["--ranks", "9"],
    "gone.jsonl: no such file of records": ["--eval_data_path", "gone.jsonl", "--eval_every", "3"],
    "--load_model_path gone: no such folder": ["--load_model_path", "gone"],
    "--deepspeed gone.json: no such file": ["--deepspeed", "gone.json"],
    "which no run has written": ["--save_model_path", "NANO"],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_mistake_is_answered_before_any_rank_starts(
    sentence: str, nano: Path, mixed: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    wrong = [str(nano) if word == "NANO" else word for word in REFUSED[sentence]]
    with pytest.raises((UserError, click.UsageError), match=sentence):
        here.train.main(settings(nano, mixed, tmp_path / "out", *wrong), standalone_mode=False)
    assert not started
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_none(nano: Path, mixed: Path, tmp_path: Path, started: list[list[str]]) -> None:
    here.os.environ["MIRAGE_PORT"] = "many"
    with pytest.raises(UserError, match="MIRAGE_PORT=many: give a port"):
        here.train.main(settings(nano, mixed, tmp_path), standalone_mode=False)


@pytest.mark.parametrize("before", [0, 1])
def test_a_port_that_somebody_listens_on(
    before: int, nano: Path, mixed: Path, tmp_path: Path, started: list[list[str]]
) -> None:
    """It is the ranks' port, or the guards' behind it."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1] - before
        here.os.environ["MIRAGE_PORT"] = str(port)
        with pytest.raises(UserError, match=f"MIRAGE_PORT={port}: this port or the next cannot be listened on"):
            here.train.main(settings(nano, mixed, tmp_path), standalone_mode=False)
    assert not started


def test_ranks_start_no_ranks(nano: Path, mixed: Path, tmp_path: Path, started: list[list[str]]) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    here.os.environ.update(place)
    with pytest.raises(UserError, match="let it start the module"):
        here.train.main(settings(nano, mixed, tmp_path), standalone_mode=False)


@pytest.mark.parametrize("module", [["mirage_ds", "plan"], ["mirage_ds.train"]])
def test_ctrl_c_while_modules_are_imported_is_one_line(module: list[str], tmp_path: Path) -> None:
    """Stopped in the middle: in click's place stands a module that waits."""
    (tmp_path / "click.py").write_text("import time; open('there', 'w').close(); time.sleep(30)")
    if module == ["mirage_ds.train"]:
        (tmp_path / "torch").mkdir()
        (tmp_path / "click.py").rename(tmp_path / "torch/__init__.py")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-m", *module], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={"PYTHONPATH": path}
    ) as process:
        until = time.monotonic() + 20
        while not (tmp_path / "there").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert (process.returncode, said) == (EXIT_STOPPED, "stopped\n")


def test_ports_of_a_job_are_none_that_the_kernel_gives_away_itself() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    given = [here.free_ports() for _ in range(20)]
    assert max(given) + 1 < lowest
    assert len(set(given)) > 1
