"""The doctor's programs on the hosts, and the way to them: the probe, the transport, the ranks, on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mirage_ds.cluster.doctor import probe, transport
from mirage_ds.cluster.doctor.bandwidth import judge, requests
from mirage_ds.cluster.doctor.job import find_job, slurm_hosts
from mirage_ds.cluster.doctor.transport import Answer, ask_all, source_of
from mirage_ds.cluster.hosts import Host
from mirage_ds.errors import UserError

# The probe


def request(**changed: Any) -> dict[str, Any]:
    return {
        **{
            "number": 0,
            "cwd": "/",
            "token": ".token",
            "master": "localhost",
            "port": 1,
            "packages": [],
            "names": ["PATH"],
        },
        **{"prefixes": ["NCCL_"], "secret": "KEY", "models": {}, "cache_dir": None, "files": {}, "records": []},
        **{"image_root": None, "run_folder": None, "write_bytes": 1 << 20, "limit_s": 5},
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
    says = f"case $1 in --query-gpu=*) printf '{GPU_CSV}';; *) printf 'GPU-bb, 4711, 30000\\n';; esac"
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


def test_a_taken_port_is_seen_and_another_offered() -> None:
    with socket.create_server(("", 0)) as taken:
        found = probe.port(request(port=taken.getsockname()[1]))
        assert found["fault"] == "Address already in use"
        assert found["free"] != taken.getsockname()[1]
    with socket.socket() as free:
        free.bind(("", 0))
        number = free.getsockname()[1]
    assert probe.port(request(port=number))["fault"] is None
    assert probe.port(request(number=1, port=number)) == {}


def test_the_run_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    assert probe.folder(request(run_folder=str(tmp_path)))["shared"] is False
    (tmp_path / ".token").touch()
    found = probe.folder(request(run_folder=str(tmp_path)))
    assert (found["there"], found["shared"]) == (True, True)
    assert found["write_bytes_s"] > 0
    assert found["free_bytes"] > 0
    assert [file.name for file in tmp_path.iterdir()] == [".token"]
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
        end = time.monotonic() + 5
        while "ninja" not in probe.locks({})["compilers"]:
            assert time.monotonic() < end
    finally:
        child.kill()
        child.wait()


def test_secrets_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_API_KEY", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert probe.variables(request()) == {"NCCL_DEBUG": "INFO", "PATH": os.environ["PATH"]}


def test_model_files_are_read_to_their_headers(nano: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from transformers import Qwen2_5_VLForConditionalGeneration

    found = probe.model_files(nano)
    assert found["fault"] is None
    assert found["elements"] == Qwen2_5_VLForConditionalGeneration.from_pretrained(nano).num_parameters()
    assert found["files"] == {file.name: file.stat().st_size for file in nano.iterdir()}
    weights = (nano / "model.safetensors").read_bytes()
    for number, (name, content, says) in enumerate(
        [
            ("model.safetensors", weights[:-1], "model.safetensors: is cut off"),
            ("model.safetensors", weights[:100], "model.safetensors: is cut off"),
            ("model.safetensors", b"", "model.safetensors: is cut off"),
            ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "model.safetensors: is no valid file of its kind"),
            ("config.json", b"{", "config.json: is no valid file of its kind"),
            ("config.json", None, "config.json: No such file or directory"),
            (
                "model.safetensors.index.json",
                b'{"weight_map": {"w": "model-2.safetensors"}}',
                "model-2.safetensors: No such",
            ),
        ]
    ):
        folder = copytree(nano, tmp_path / str(number))
        (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()
        assert (probe.model_files(folder)["fault"] or "").startswith(says), (name, says)


def test_hub_models_are_looked_for_where_the_hubs_client_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.file_download import repo_folder_name

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    ask = request(models={"--model": "org/name"})
    folder = tmp_path / "hub" / repo_folder_name(repo_id="org/name", repo_type="model")
    assert probe.models(ask)["--model"] == {"hub": str(folder), "kept": False}
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/config.json").write_text("{}")
    assert probe.models(ask)["--model"]["kept"] is True
    assert probe.models({**ask, "cache_dir": str(tmp_path / "other")})["--model"]["kept"] is False


def test_records_and_the_first_ones_images_have_to_be_readable(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    ask = request(files={"--data_path": str(file)}, records=["--data_path"])
    assert probe.data(ask)["--data_path"] == {"bytes": None, "fault": "No such file or directory"}
    file.write_text('\n{"image_input": ["i.png"], "image_output": "o.png"}\n')
    assert probe.data(ask)["--data_path"]["fault"] == "the first record's image i.png cannot be read"
    (tmp_path / "i.png").touch()
    assert probe.data(ask)["--data_path"]["fault"] == "the first record's image o.png cannot be read"
    (tmp_path / "root").mkdir()
    (tmp_path / "root/o.png").touch()
    assert probe.data({**ask, "image_root": str(tmp_path / "root")})["--data_path"] == {"bytes": 53, "fault": None}
    file.write_text("{\n")
    assert probe.data(ask)["--data_path"]["fault"] == "line 1 is no record"


def test_the_code_has_a_hash_that_changes_with_it(tmp_path: Path) -> None:
    source = "import json; from mirage_ds_doctor_probe import code; print(json.dumps(code({})))"
    (tmp_path / "mirage_ds_doctor_probe.py").write_text(source_of("probe.py"))
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
    source = source_of("probe.py").replace("__main__", "imported")
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
                    255, "host key is not known here", "known_hosts"),
    "changed key": ("@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @\nHost key verification failed.", 255,
                    "host key has changed", "ssh-keygen -R b"),
    "no sshd": ("ssh: connect to host b port 22: Connection refused", 255, "refuses the connection", "start sshd"),
    "silence": ("ssh: connect to host b port 22: Connection timed out", 255, "cannot be reached", "cable"),
    "no route": ("ssh: connect to host b port 22: No route to host", 255, "cannot be reached", "firewall"),
    "no name": ("ssh: Could not resolve hostname b: Name or service not known", 255, "name cannot be resolved", "DNS"),
    "no python": ("bash: line 1: /env/bin/python: No such file or directory", 127, "has no such interpreter",
                  sys.executable),
    "something else": ("kex_exchange_identification: banner exchange", 255, "exit code 255): kex_exchange", "by hand"),
    "nothing": ("", 0, "exit code 0): it said nothing", "by hand"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_ssh_says_becomes_a_fault_with_its_own_cure(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, fault, mend = REFUSALS[what]
    ssh_that(tmp_path, monkeypatch, f"cat > /dev/null <<'END'\nEND\nprintf '%s\\n' '{words}' >&2; exit {code}")
    (answer,) = ask_all(["b"], transport.ssh(""), source_of("probe.py"), [request()], 5)
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
        ask = request(names=["PYTHONPATH", "OMP_NUM_THREADS"], prefixes=["UCX_", "NCCL_"])
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        (answer,) = ask_all(["b"], transport.ssh(code), source_of("probe.py"), [ask], 10)
        assert answer.fault == ""
        wanted = {
            "NCCL_X": "two words",
            "NCCL_Y": "$z",
            "NCCL_Z": "%on b",
            "PYTHONPATH": "/start:/x y",
            "UCX_TLS": "t$1",
        }
        assert answer.lines[-1]["facts"]["variables"] == wanted | ({"NCCL_DEBUG": nccl} if nccl else {})
        assert abs(answer.offset_s) < 0.5


def test_a_host_that_hangs_is_left_in_time_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh_that(tmp_path, monkeypatch, "exec sleep 98765")
    begin = time.monotonic()
    (answer,) = ask_all(["b"], transport.ssh(""), "", [request()], 0.5)
    assert time.monotonic() - begin < 3
    assert answer.fault == "gave no answer within 0.5 s"
    assert not any("98765" in process.cmdline() for process in psutil.Process().children(recursive=True))


TELLS = (
    "import json, sys, time; asked = json.loads(sys.stdin.readline()); "
    "say = lambda **v: print('\\x1emirage-doctor ' + json.dumps(v), flush=True); "
)


def test_clocks_are_compared_in_the_middle_of_the_round_trip() -> None:
    source = TELLS + "say(ready=1); sys.stdin.readline(); time.sleep(0.4); say(time=time.time() - 0.2 + 100)"
    (answer,) = ask_all(["b"], transport.local, source, [request()], 10)
    # The host looked at its clock half-way of 0.4 s.
    assert answer.offset_s == pytest.approx(100, abs=0.1)
    assert answer.error_s == pytest.approx(0.2, abs=0.1)


def test_hosts_are_asked_at_the_same_time_and_answer_in_order() -> None:
    source = TELLS + "n = asked['number']; time.sleep(0.6 - n / 10); say(n=n)"
    begin = time.monotonic()
    asked = [request(number=number) for number in range(4)]
    answers = ask_all(list("abcd"), transport.local, source, asked, 10)
    assert time.monotonic() - begin < 2
    assert [(answer.host, answer.lines) for answer in answers] == [(name, [{"n": n}]) for n, name in enumerate("abcd")]


def test_when_one_of_several_that_work_together_fails_the_others_are_not_waited_for() -> None:
    source = TELLS + "say(up=1); sys.exit(7) if FAILS else time.sleep(60)"
    begin = time.monotonic()
    reach = {"a": "FAILS = True\n", "b": "FAILS = False\n"}

    def command(host: str) -> list[str]:
        return [sys.executable, "-c", f"{reach[host]}{transport.LOADER}"]

    answers = ask_all(["a", "b"], command, source, [request(), request()], 50, together=True)
    assert time.monotonic() - begin < 10
    assert answers[0].fault.startswith("ended with exit code 7")
    assert answers[1].fault


@contextmanager
def started_ranks(count: int, world_size: int, limit_s: float = 60) -> Iterator[subprocess.Popen[str]]:
    """A host's starter with ranks that wait for one that never comes."""
    asked = {
        **requests([Host("a", count), Host("b", world_size - count)], "127.0.0.1", free_port(), "gloo", "/")[0],
        "limit_s": limit_s,
    }
    with subprocess.Popen(transport.local("a"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdin
        starter.stdin.write(
            f"{json.dumps(source_of('rank.py').replace('MEET_S = 8.0', 'MEET_S = 50.0'))}\n{json.dumps(asked)}\n"
        )
        starter.stdin.flush()
        try:
            yield starter
        finally:
            starter.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("how", ["standard input closed", "killed"])
def test_ranks_end_with_who_asked_for_them(how: str) -> None:
    with started_ranks(2, 3) as starter:
        parent = psutil.Process(starter.pid)
        end = time.monotonic() + 20
        # They are ranks once they have asked the kernel to die with their parent: then they listen or connect.
        while len(parent.children()) < 2 or not any(child.net_connections() for child in parent.children()):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        ranks = parent.children()
        if how == "killed":
            starter.send_signal(signal.SIGKILL)
        else:
            assert starter.stdin
            starter.stdin.close()
        gone, alive = psutil.wait_procs(ranks, timeout=5)
        assert (len(gone), alive) == (2, [])


def test_ranks_end_by_themselves_when_nobody_hears_of_them_any_more() -> None:
    """As behind a cut cable: standard input stays open."""
    with started_ranks(2, 3, limit_s=0.5) as starter:
        end = time.monotonic() + 10
        ranks: list[psutil.Process] = []
        while starter.poll() is None:
            ranks = ranks or psutil.Process(starter.pid).children()
            assert time.monotonic() < end
            time.sleep(0.02)
        assert ranks
        assert psutil.wait_procs(ranks, timeout=5)[1] == []


def test_two_ranks_measure_and_one_that_is_alone_says_so() -> None:
    """Real ranks on gloo, both on this machine."""
    hosts = [Host("a", 1), Host("b", 1)]
    asked = requests(hosts, "127.0.0.1", free_port(), "gloo", "/")
    for one in asked:
        one["elements"] = 1 << 18
    found = judge(hosts, ask_all(["a", "b"], transport.local, source_of("rank.py"), asked, 60, together=True), asked)
    assert found.faults == {}
    assert found.all_reduce > 1e6
    assert found.all_gather > 1e6
    assert found.pairs.keys() == {("a", "b")}
    assert found.pairs["a", "b"] > 1e6
    source = source_of("rank.py").replace("MEET_S = 8.0", "MEET_S = 0.6")
    alone = requests(hosts, "127.0.0.1", free_port(), "gloo", "/")
    answers = ask_all(["a"], transport.local, source, alone[:1], 20, together=True)
    answers.append(Answer("b", []))
    assert judge(hosts, answers, alone).faults["b"][0].endswith("did not come within 0.6 s")


# Hosts of a job


def test_slurm_nodes_and_their_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "scontrol", "printf 'n1\\nn2\\nn3\\n'")
    script(tmp_path, "srun", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"SLURM_JOB_NODELIST": "n[1-3]"}
    assert slurm_hosts({**job, "SLURM_TASKS_PER_NODE": "8(x2),4"}) == (Host("n1", 8), Host("n2", 8), Host("n3", 4))
    assert slurm_hosts({**job, "SLURM_NTASKS_PER_NODE": "2"}) == (Host("n1", 2), Host("n2", 2), Host("n3", 2))
    assert slurm_hosts(job) == (Host("n1", 0), Host("n2", 0), Host("n3", 0))


def test_a_faulty_environment_file_does_not_keep_the_doctor_from_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_that(tmp_path, monkeypatch, "exit 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text('# NCCL_A=1\n\nNCCL_B=2\nNCCL_C="two words"\n')
    (tmp_path / "hosts").write_text("b slots=1\n")
    command = find_job(tmp_path / "hosts", False, {}).reach("b")[-1]
    assert "export NCCL_B=2; " in command
    assert "NCCL_A" not in command
    assert "NCCL_C" not in command


def test_user_errors_are_not_swallowed(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\n")
    with pytest.raises(UserError, match="line 1"):
        find_job(tmp_path / "hosts", False, {})
