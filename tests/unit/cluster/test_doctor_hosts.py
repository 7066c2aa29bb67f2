"""The doctor's programs on the hosts, and the way to them: the probe, the transport, the ranks, on this machine."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from mirage_ds.cluster.doctor import probe, transport
from mirage_ds.cluster.doctor.bandwidth import SOURCE, measure
from mirage_ds.cluster.doctor.examine import find_job, slurm_hosts
from mirage_ds.cluster.doctor.spec import DoctorSpec
from mirage_ds.cluster.doctor.transport import ask_all
from mirage_ds.cluster.here import free_ports
from mirage_ds.cluster.hosts import Host
from mirage_ds.errors import UserError

ROOT = Path(__file__).parents[3]
PROBE = Path(probe.__file__).read_text()

# The probe


def request(**changed: Any) -> dict[str, Any]:
    return {
        "number": 0,
        "cwd": "/",
        "sign": "",
        "master": "localhost",
        "master_port": 1,
        "packages": [],
        "wanted": "PATH$|NCCL_",
        "secret": "KEY",
        "models": {},
        "cache_dir": None,
        "files": {},
        "images": {},
        "run_folder": None,
        "write_bytes": 1 << 20,
        "limit_s": 5,
        **changed,
    }


GPU_CSV = """\
0, NVIDIA H100 80GB HBM3, GPU-aa, 580.95.05, 81559, 4, 0
1, NVIDIA H100 80GB HBM3, GPU-bb, 580.95.05, 81559, 30117, [N/A]
"""


def script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_what_nvidia_smi_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `nvidia-smi` that prints what the real one prints."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    says = f"case $1 in --query-gpu=*) printf '{GPU_CSV}';; *) printf 'GPU-bb, 4711\\n';; esac"
    script(tmp_path, "nvidia-smi", says.replace("\n", "\\n"))
    found = probe.gpus({})["gpus"]
    assert [(gpu["index"], gpu["driver"], gpu["total_mib"], gpu["used_mib"]) for gpu in found] == [
        (0, "580.95.05", 81559, 4),
        (1, "580.95.05", 81559, 30117),
    ]
    assert [(gpu["name"], gpu["ecc_faults"], gpu["pids"]) for gpu in found] == [
        ("NVIDIA H100 80GB HBM3", 0, []),
        ("NVIDIA H100 80GB HBM3", 0, [4711]),
    ]
    script(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert probe.gpus({})["fault"] == "Failed to initialize NVML: Driver/library version mismatch"


@pytest.mark.parametrize("offset", [0, 1])
def test_a_taken_port_is_seen_and_two_others_offered(offset: int) -> None:
    """The ranks' own port, or the next one, which their guards take."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        found = probe.ports(request(master_port=port - offset))
        assert found["faults"][port] == "Address already in use"
        assert port not in (found["free"], found["free"] + 1)
    assert port not in probe.ports(request(master_port=port))["faults"]
    assert probe.ports(request(master_port=found["free"])) == {"faults": {}, "free": found["free"]}
    assert probe.ports(request(number=1, master_port=port)) == {}


def test_the_run_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    assert probe.folder(request(run_folder=str(tmp_path)))["shared"] is False
    sign = tmp_path / ".sign"
    sign.mkdir()
    found = probe.folder(request(run_folder=str(tmp_path), sign=str(sign)))
    assert (found["there"], found["shared"]) == (True, True)
    assert found["write_bytes_s"] > 0
    assert found["free_bytes"] > 0
    assert [*tmp_path.rglob("*")] == [sign]
    assert probe.folder(request(run_folder=str(tmp_path / "gone"))) == {"there": False}
    assert probe.folder(request(run_folder=None)) == {}


def test_a_folder_that_cannot_be_written_to_says_why() -> None:
    # No file can be made there, not even by root.
    assert probe.folder(request(run_folder="/proc"))["fault"]


def test_compile_locks_are_found_with_their_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert probe.locks({})["locks"] == []
    for place in ("cpu_adam", "py311_cu130/fused_adam"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "lock").touch()
    os.utime(tmp_path / "cpu_adam/lock", (time.time() - 500,) * 2)
    found = {lock["path"]: lock["age_s"] for lock in probe.locks({})["locks"]}
    assert found.keys() == {str(tmp_path / "cpu_adam/lock"), str(tmp_path / "py311_cu130/fused_adam/lock")}
    assert 500 <= found[str(tmp_path / "cpu_adam/lock")] < 560
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert probe.locks({})["locks"] == []


def test_a_running_compiler_is_seen() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "open('/proc/self/comm', 'w').write('ninja'); input()"], stdin=subprocess.PIPE
    )
    try:
        end = time.monotonic() + 60
        while "ninja" not in probe.locks({})["compilers"]:
            assert time.monotonic() < end
    finally:
        child.kill()
        child.wait()


def test_secrets_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert probe.variables(request()) == {"NCCL_DEBUG": "INFO", "PATH": os.environ["PATH"]}


def test_a_models_files_have_their_bytes_and_weights(nano: Path) -> None:
    found = probe.models(request(models={"--model": str(nano)}))["--model"]
    assert found["files"] == {file.name: file.stat().st_size for file in nano.iterdir()}
    with safe_open(nano / "model.safetensors", "np") as file:
        wanted = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # no dict
    assert (found["weights"], found["fault"]) == (wanted, None)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_shard(folder: Path) -> None:
    names = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "model.safetensors is cut off, or damaged"),
        (lose_a_shard, "model-00002-of-00002.safetensors is named by model.safetensors.index.json and is not there"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights (*.safetensors) in it"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "its weights cannot be read"),
    ],
)
def test_a_broken_model_is_named_where_only_the_host_sees_it(
    harm: Callable[[Path], None], said: str, nano: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(nano, tmp_path / "model")
    harm(folder)
    assert str(probe.models(request(models={"--model": str(folder)}))["--model"]["fault"]).startswith(said)


def test_hub_models_are_looked_for_where_the_hubs_client_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.file_download import repo_folder_name

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    ask = request(models={"--model": "org/name"})
    folder = tmp_path / "hub" / repo_folder_name(repo_id="org/name", repo_type="model")
    assert probe.models(ask)["--model"] == {"fault": "no such folder", "hub": str(folder), "kept": False}
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/config.json").write_text("{}")
    assert probe.models(ask)["--model"]["kept"] is True
    assert probe.models({**ask, "cache_dir": str(tmp_path / "other")})["--model"]["kept"] is False


def test_files_and_the_first_records_images_have_to_be_readable(tmp_path: Path) -> None:
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    near, root = tmp_path / "i.png", tmp_path / "root/i.png"
    ask = request(files={"--data_path": [*map(str, files)]}, images={"--data_path": [[str(near), str(root)]]})
    files[0].write_bytes(b"\xff" * 7)
    assert probe.data(ask)["--data_path"]["fault"] == f"{files[1]}: No such file or directory"
    files[1].write_bytes(b"12345")
    assert probe.data(ask)["--data_path"]["fault"] == f"the first record's image {near} cannot be read"
    root.parent.mkdir()
    root.touch()
    assert probe.data(ask)["--data_path"] == {"files": {"together": 12}, "fault": None}


def test_the_code_has_a_hash_that_changes_with_it(tmp_path: Path) -> None:
    source = "import json; from mirage_ds_doctor_probe import code; print(json.dumps(code({})))"
    (tmp_path / "mirage_ds_doctor_probe.py").write_text(PROBE)
    (tmp_path / "tree/mirage_ds").mkdir(parents=True)

    def found() -> dict[str, Any]:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'tree'}:{tmp_path}"}
        said = subprocess.run(
            [sys.executable, "-S", "-c", source], env=environment, cwd=tmp_path, capture_output=True, check=True
        )
        return json.loads(said.stdout)

    # A folder without __init__.py is no package, though Python would import it.
    assert found() == {"folder": None}
    (tmp_path / "tree/mirage_ds/__init__.py").write_text("a = 1\n")
    first = found()
    assert first["folder"] == str(tmp_path / "tree/mirage_ds")
    assert first["commit"] is None
    (tmp_path / "tree/mirage_ds/__init__.py").write_text("a = 2\n")
    assert found()["hash"] != first["hash"]
    head = ["git", "-C", Path(probe.__file__).parent, "rev-parse", "HEAD"]
    said = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    assert probe.code({})["commit"] == (said or None)


def test_the_probe_imports_nothing_but_the_standard_library() -> None:
    source = PROBE.replace("__main__", "imported")
    code = f"import sys; exec({source!r}); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    tops = {name.partition(".")[0] for name in eval(loaded)}
    assert tops <= set(sys.stdlib_module_names) | {"__main__", "_distutils_hack"}


# The transport


def ssh_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put an `ssh` of this text before the real one."""
    script(tmp_path / "bin", "ssh", text)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


# What OpenSSH 9.2 writes.
REFUSALS = {
    "Permission denied": ("u@b: Permission denied (publickey).", 255, "ssh key is refused", "ssh-copy-id b"),
    "unknown key": ("No ED25519 host key is known for b and you ….\nHost key verification failed.",
                    255, "host key is not known here", "ssh b once by hand"),
    "changed key": ("@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @\nHost key verification failed.", 255,
                    "or has changed", "ssh-keygen -R b"),
    "no sshd": ("ssh: connect to host b port 22: Connection refused", 255, "port 22: Connection refused", "is up"),
    "silence": ("ssh: connect to host b port 22: Connection timed out", 255, "Connection timed out", "cable"),
    "no route": ("ssh: connect to host b port 22: No route to host", 255, "No route to host", "firewall"),
    "no name": ("ssh: Could not resolve hostname b: Name or service not known", 255, "Could not resolve", "name"),
    "no python": ("bash: line 1: /env/bin/python: No such file or directory", 127, "has no such interpreter",
                  sys.executable),
    "something else": ("kex_exchange_identification: banner exchange", 255, "exit code 255): kex_exchange",
                       sys.executable),
    "nothing": ("", 0, "exit code 0): it said nothing", sys.executable),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_ssh_says_becomes_a_fault_with_its_own_cure(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, fault, mend = REFUSALS[what]
    ssh_that(tmp_path, monkeypatch, f"cat > /dev/null <<'END'\nEND\nprintf '%s\\n' '{words}' >&2; exit {code}")
    (answer,) = ask_all(["b"], transport.ssh(""), PROBE, request(), 5)
    assert (answer.host, answer.lines) == ("b", [])
    assert fault in answer.fault
    assert mend in answer.mend


HERE_SHELL = 'while [ "$1" != b ]; do shift; done; shift; echo Welcome to b; exec sh -c "$*"'


def test_a_greeting_does_no_harm_and_exports_arrive_as_deepspeed_sends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_that(tmp_path, monkeypatch, HERE_SHELL)
    environment = {"PYTHONPATH": "/x y", "UCX_TLS": "t$1", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3", "HOME": "/h"}
    for gpus, nccl in ((False, None), (True, "INFO")):
        code = transport.exports(
            environment, "/start", gpus, {"NCCL_X": "two words", "NCCL_Y": "\\$z", "NCCL_Z": "%%on %h"}
        )
        ask = request(wanted="PYTHONPATH|OMP_NUM_THREADS|UCX_|NCCL_")
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        (answer,) = ask_all(["b"], transport.ssh(code), PROBE, ask, 10)
        assert answer.fault == ""
        wanted = {
            "NCCL_X": "two words",
            "NCCL_Y": "$z",
            "NCCL_Z": "%on b",
            "PYTHONPATH": "/start:/x y",
            "UCX_TLS": "t$1",
        }
        assert answer.lines[-1]["facts"]["variables"] == wanted | ({"NCCL_DEBUG": nccl} if nccl else {})
        assert answer.skew_s == 0


def test_a_host_that_hangs_is_left_in_time_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh_that(tmp_path, monkeypatch, "exec sleep 98765")
    begin = time.monotonic()
    (answer,) = ask_all(["b"], transport.ssh(""), "", request(), 0.5)
    assert time.monotonic() - begin < 60
    assert answer.fault == "gave no answer within 0.5 s"
    assert not any("98765" in process.cmdline() for process in psutil.Process().children(recursive=True))


TELLS = (
    "import json, sys, time; asked = json.loads(sys.stdin.readline()); "
    "say = lambda **v: print('\\x1emirage-doctor ' + json.dumps(v), flush=True); "
)


@pytest.mark.parametrize(("ahead", "least"), [(0, 0), (100, 99.5), (-100, -99.5)])
def test_a_clock_is_compared_with_when_it_was_asked_and_heard_of(ahead: float, least: float) -> None:
    (answer,) = ask_all(["b"], transport.local, TELLS + f"say(time=time.time() + {ahead})", request(), 10)
    assert answer.skew_s == pytest.approx(least, abs=0.5)


def test_hosts_are_asked_at_the_same_time_and_answer_in_order(tmp_path: Path) -> None:
    # None answers before all have been asked; the last is the first to do so.
    source = (
        f"{TELLS} import pathlib; here = pathlib.Path({str(tmp_path)!r})\n"
        "n = asked['number']; (here / str(n)).touch()\n"
        "while len(list(here.iterdir())) < 4: time.sleep(0.01)\n"
        "time.sleep(0.3 - n / 10); say(n=n)"
    )
    answers = ask_all(list("abcd"), transport.local, source, request(), 60)
    assert [(answer.host, answer.lines) for answer in answers] == [(name, [{"n": n}]) for n, name in enumerate("abcd")]


def test_when_one_of_several_that_work_together_fails_the_others_are_not_waited_for() -> None:
    source = TELLS + "say(up=1); sys.exit(7) if FAILS else time.sleep(600)"
    begin = time.monotonic()
    reach = {"a": "FAILS = True\n", "b": "FAILS = False\n"}

    def command(host: str) -> list[str]:
        return [sys.executable, "-c", f"{reach[host]}{transport.LOADER}"]

    answers = ask_all(["a", "b"], command, source, request(), 500, together=True)
    assert time.monotonic() - begin < 100
    assert answers[0].fault.startswith("ended with exit code 7")
    assert answers[1].fault


@contextmanager
def started_ranks(limit_s: float = 60) -> Iterator[subprocess.Popen[str]]:
    """What starts a host's two ranks, which wait for one that never comes."""
    asked = {"slots": [2, 1], "number": 0, "master_addr": "127.0.0.1", "master_port": free_ports(), "cwd": "/"}
    with subprocess.Popen(transport.local("a"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdin
        starter.stdin.write(f"{json.dumps(SOURCE)}\n{json.dumps({**asked, 'limit_s': limit_s})}\n")
        starter.stdin.flush()
        try:
            yield starter
        finally:
            starter.kill()


def ranks_of(starter: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until there are two guards and their ranks, and return them."""
    end = time.monotonic() + 20
    while len(ranks := psutil.Process(starter.pid).children(recursive=True)) < 4:
        assert time.monotonic() < end
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize("how", ["standard input closed", "killed", "nobody hears of them"])
def test_ranks_end_with_who_asked_for_them(how: str) -> None:
    """Behind a cut cable standard input stays open: there the time is over."""
    with started_ranks(limit_s=1 if how == "nobody hears of them" else 60) as starter:
        ranks = ranks_of(starter)
        if how == "killed":
            starter.send_signal(signal.SIGKILL)
        elif how == "standard input closed":
            assert starter.stdin
            starter.stdin.close()
        gone, alive = psutil.wait_procs(ranks, timeout=8)
        assert (len(gone), alive) == (4, [])


def test_two_ranks_measure() -> None:
    """Real ranks on gloo, both on this machine."""
    hosts = [Host("a", 1), Host("b", 1)]
    found = measure(hosts, transport.local, "127.0.0.1", free_ports(), str(ROOT))
    assert found.faults == {}
    assert found.all_reduce > 1e6
    assert found.all_gather > 1e6
    ((*pair, rate),) = found.pairs
    assert (pair, rate > 1e6) == (["a", "b"], True)


def test_a_rank_that_does_not_come_is_named() -> None:
    hosts = [Host("a", 1), Host("b", 1)]

    def reach(host: str) -> list[str]:
        # A host that never starts anything.
        fast = f"import mirage_ds.cluster.doctor.bandwidth as r; r.BOUNDS['gather'] = 5; {transport.LOADER}"
        return [sys.executable, "-c", fast if host == "a" else "import time; time.sleep(60)"]

    found = measure(hosts, reach, "127.0.0.1", free_ports(), str(ROOT)).faults
    assert found.keys() == {"b"}, found
    assert "rank(s) 1 of 2 did not start within 5 s" in found["b"][0]


# Hosts of a job


def test_slurm_nodes_and_their_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "scontrol", "printf 'n1\\nn2\\nn3\\n'")
    script(tmp_path, "srun", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"SLURM_JOB_NODELIST": "n[1-3]"}
    assert slurm_hosts({**job, "SLURM_TASKS_PER_NODE": "8(x2),4"}) == (Host("n1", 8), Host("n2", 8), Host("n3", 4))
    assert slurm_hosts({**job, "SLURM_TASKS_PER_NODE": "2(x3)"}) == (Host("n1", 2), Host("n2", 2), Host("n3", 2))
    assert slurm_hosts(job) == (Host("n1", 0), Host("n2", 0), Host("n3", 0))


def test_a_faulty_environment_file_does_not_keep_the_doctor_from_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_that(tmp_path, monkeypatch, "exit 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text('# NCCL_A=1\n\nNCCL_B=2\nNCCL_C="two words"\n')
    (tmp_path / "hosts").write_text("b slots=1\n")
    command = find_job(DoctorSpec(hostfile=tmp_path / "hosts"), {}).reach("b")[-1]
    assert "export NCCL_B=2; " in command
    assert "NCCL_A" not in command
    assert "NCCL_C" not in command


def test_user_errors_are_not_swallowed(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\n")
    with pytest.raises(UserError, match="line 1"):
        find_job(DoctorSpec(hostfile=tmp_path / "hosts"), {})
