"""The doctor on real hosts: nothing to say of healthy ones, and each fault that hosts can have named on the right one.

Hosts here share the machine's clock, disks and packages; mounts that one host alone sees stand for what differs. A
clock that differs, GPUs, drivers, NCCL and InfiniBand are injected in tests/unit/cluster/test_doctor.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mirage_ds.cluster.doctor.checks import CHECKS

from .hosts import Cluster, Host, wait_until
from .jobs import PYTHON, ROOT
from .slurm import Slurm

DOCTOR = (PYTHON, "-m", "mirage_ds", "doctor")
# PYTHONPATH: this checkout is tested, wherever the environment's own install leads.
CPU = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
# A host that does not answer may cost as long.
SILENT_S = 15
# On two cores that import torch for three hosts at once, among other jobs.
BANDWIDTH_S = 60
SLOW = ("rate", "200mbit", "burst", "128k", "latency", "200ms")


class Said(NamedTuple):
    """What the doctor said: (check, host, status) of what is not well, and everything."""

    code: int
    seconds: float
    bad: set[tuple[str, str, str]]
    everything: dict[str, Any]

    def says(self, check: str, host: str) -> str:
        """Return what is seen and how to mend it."""
        found = [one for one in self.everything["findings"] if (one["check"], one["host"]) == (check, host)]
        assert len(found) == 1, self.everything["findings"]
        return f"{found[0]['says']}; {found[0]['mend']}"


def ask(host: Host, *words: object, cwd: Path, before: tuple[str, ...] = (), **variables: str) -> Said:
    """Run the doctor on a host and read its JSON."""
    begin = time.monotonic()
    done = host.run(
        [*before, *DOCTOR, "--json", *map(str, words)],
        check=False,
        cwd=cwd,
        env={**CPU, "PATH": f"{PYTHON.parent}:/usr/bin:/bin:/usr/sbin:/sbin", **variables},
    )
    seconds = time.monotonic() - begin
    assert done.stdout.startswith("{"), f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    everything = json.loads(done.stdout)
    # How busy this machine's disk is at the moment is no part of these tests.
    judged = [one for one in everything["findings"] if one["status"] != "pass" and "/s, synced, " not in one["says"]]
    bad = {(one["check"], one["host"], one["status"]) for one in judged}
    # Where the working tree has changes, it says so of every host alike.
    bad = {one for one in bad if one[0] != "code" or one[2] == "fail"}
    assert done.returncode == (2 if any(one[2] == "fail" for one in bad) else 0)
    return Said(done.returncode, seconds, bad, everything)


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """Where the job starts: a hostfile, and an environment file that gives every rank what it needs."""
    cluster.hostfile(tmp_path / "hosts", slots=1)
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n")
    (tmp_path / "run").mkdir()
    yield tmp_path
    assert list((tmp_path / "run").iterdir()) == [], "left in the run folder"


@contextmanager
def mounted(host: Host, *options: object, over: Path) -> Iterator[None]:
    """Mount something that this host alone sees."""
    host.run(["mount", *map(str, options), over])
    try:
        yield
    finally:
        host.run(["umount", over])


@contextmanager
def replaced(file: Path, text: str) -> Iterator[None]:
    """Give a file another content for a while."""
    old = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(old)


QUICK = ("--hostfile", "hosts", "--save_model_path", "run", "--no_bandwidth")


def test_healthy_hosts_have_nothing_to_mend(cluster: Cluster, folder: Path, nano: Path, mixed: Path) -> None:
    words = ("--model", nano, "--data_path", mixed, "--deepspeed", ROOT / "ds_configs/zero3.json")
    said = ask(cluster.hosts[0], "--hostfile", "hosts", "--save_model_path", "run", *words, cwd=folder)
    assert (said.code, said.bad) == (0, set())
    assert said.seconds < BANDWIDTH_S
    assert {one["check"] for one in said.everything["findings"]} == CHECKS.keys() - {"probe"}
    measured = said.everything["bandwidth"]
    names = [host.name for host in cluster.hosts]
    assert [pair[:2] for pair in sorted(measured["pairs"])] == [[names[0], names[1]], [names[0], names[2]], names[1:]]
    assert all(
        rate > 1e6 for rate in (measured["all_reduce"], measured["all_gather"], *(p[2] for p in measured["pairs"]))
    )
    assert [facts["place"]["hostname"] for facts in said.everything["facts"].values()] == names
    quick = ask(cluster.hosts[0], *QUICK, *words, cwd=folder)
    assert quick.bad == set()
    print(f"three hosts: {said.seconds:.1f} s, without bandwidth {quick.seconds:.1f} s")


# Hosts that cannot be asked


def test_a_cut_cable_is_told_in_time_and_the_others_are_looked_at(cluster: Cluster, folder: Path) -> None:
    cluster.hosts[2].cut_cable()
    said = ask(cluster.hosts[0], "--hostfile", "hosts", "--save_model_path", "run", cwd=folder)
    assert said.bad == {("ssh", "node3", "fail"), ("bandwidth", "here", "warn")}
    assert said.seconds < SILENT_S
    assert "see whether node3 is up, and its name, address, cable and firewall" in said.says("ssh", "node3")
    assert said.everything["facts"].keys() == {"node1", "node2"}


def test_a_host_without_power_is_told_in_time(cluster: Cluster, folder: Path) -> None:
    cluster.hosts[1].power_off()
    said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("ssh", "node2", "fail")}
    assert said.seconds < SILENT_S


def sshd_of(host: Host) -> int:
    """Return sshd's pid as the host sees it."""
    return int(host.run(["pgrep", "-o", "-x", "sshd"]).stdout)


def test_a_stopped_sshd_is_told_in_time(cluster: Cluster, folder: Path) -> None:
    """It accepts connections, by the kernel, and says nothing."""
    host = cluster.hosts[1]
    pid = str(sshd_of(host))
    host.run(["kill", "-STOP", pid])
    try:
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    finally:
        host.run(["kill", "-CONT", pid])
    assert said.bad == {("ssh", "node2", "fail")}
    assert said.seconds < SILENT_S
    assert "timed out" in said.says("ssh", "node2")


def test_sshd_on_another_port_is_no_sshd(cluster: Cluster, folder: Path) -> None:
    config = cluster.home / ".ssh/config"
    config.write_text("Host node2\n  Port 2222\n")
    try:
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    finally:
        config.unlink()
    assert said.bad == {("ssh", "node2", "fail")}
    assert "port 2222: Connection refused; see whether node2 is up" in said.says("ssh", "node2")


def test_host_keys_unknown_and_changed(cluster: Cluster, folder: Path) -> None:
    known = cluster.home / ".ssh/known_hosts"
    key = known.read_text().split(" ", 1)[1]
    with replaced(known, f"node1,node2,10.97.0.1,10.97.0.2 {key}"):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("ssh", "node3", "fail")}
    assert "host key is not known here, or has changed; ssh node3 once by hand" in said.says("ssh", "node3")
    other = (cluster.home / ".ssh/id_ed25519.pub").read_text()
    with replaced(known, f"node1,node2,10.97.0.1,10.97.0.2 {key}node3 {other}"):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("ssh", "node3", "fail")}
    assert "or has changed" in said.says("ssh", "node3")
    assert "ssh-keygen -R node3" in said.says("ssh", "node3")


def test_a_key_that_one_host_does_not_take(cluster: Cluster, folder: Path) -> None:
    with mounted(cluster.hosts[2], "--bind", "/dev/null", over=cluster.home / ".ssh/authorized_keys"):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("ssh", "node3", "fail")}
    assert "ssh key is refused; ssh-copy-id node3" in said.says("ssh", "node3")


def test_a_name_that_nobody_knows(cluster: Cluster, folder: Path) -> None:
    (folder / "hosts").write_text("node1 slots=1\nnode9 slots=1\n")
    said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("ssh", "node9", "fail")}
    assert "Could not resolve hostname node9" in said.says("ssh", "node9")


# Hosts that differ


def test_a_host_without_the_interpreter(cluster: Cluster, folder: Path) -> None:
    with mounted(cluster.hosts[1], "-t", "tmpfs", "none", over=PYTHON.parents[1]):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("ssh", "node2", "fail")}
    assert "has no such interpreter" in said.says("ssh", "node2")
    assert str(PYTHON) in said.says("ssh", "node2")


def test_a_host_without_the_working_directory(cluster: Cluster, folder: Path) -> None:
    (folder / "work/run").mkdir(parents=True)
    (folder / "hosts").rename(folder / "work/hosts")
    with mounted(cluster.hosts[1], "-t", "tmpfs", "none", over=folder):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder / "work", DS_ENV_FILE=str(folder / ".deepspeed_env"))
    assert said.bad == {("probe", "node2", "fail")}
    assert "cannot enter the working directory: No such file" in said.says("probe", "node2")


def test_other_code_on_one_host(cluster: Cluster, folder: Path) -> None:
    shutil.copytree(ROOT / "mirage_ds", folder / "other", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "other/step.py").write_text("# changed\n")
    with mounted(cluster.hosts[2], "--bind", folder / "other", over=ROOT / "mirage_ds"):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("code", "node3", "fail")}
    assert f"{ROOT}/mirage_ds holds other code than on node1" in said.says("code", "node3")


def test_another_commit_on_one_host(cluster: Cluster, folder: Path) -> None:
    copy = folder / "copy"
    if subprocess.run(["git", "clone", "-q", "--bare", ROOT, copy], check=False).returncode:
        pytest.skip("the suite runs outside a git checkout")
    by = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    tree = subprocess.run(["git", "-C", copy, "rev-parse", "HEAD^{tree}"], capture_output=True, text=True, check=True)
    commit = ["git", "-C", copy, "commit-tree", "-m", "x", "-p", "HEAD", tree.stdout.strip()]
    new = subprocess.run(commit, capture_output=True, text=True, check=True, env={**os.environ, **by}).stdout.strip()
    subprocess.run(["git", "-C", copy, "update-ref", "HEAD", new], check=True)
    subprocess.run(["git", "-C", copy, "config", "core.bare", "false"], check=True)
    with mounted(cluster.hosts[2], "--bind", copy, over=ROOT / ".git"):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    found = [one["says"] for one in said.everything["findings"] if (one["check"], one["host"]) == ("code", "node3")]
    assert any(one.startswith(f"commit {new[:8]} (on node1 ") for one in found)


def test_another_version_of_a_package_on_one_host(cluster: Cluster, folder: Path) -> None:
    metadata = Path(str(distribution("transformers").locate_file(""))).glob("transformers-*.dist-info/METADATA")
    (file,) = metadata
    text = file.read_text()
    version = distribution("transformers").version
    (folder / "METADATA").write_text(text.replace(f"\nVersion: {version}\n", "\nVersion: 4.0.1\n", 1))
    with mounted(cluster.hosts[1], "--bind", folder / "METADATA", over=file):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("packages", "node2", "fail")}
    assert f"transformers 4.0.1 (on node1 {version})" in said.says("packages", "node2")


def test_a_run_folder_that_is_not_shared_or_not_writable(cluster: Cluster, folder: Path) -> None:
    with mounted(cluster.hosts[2], "-t", "tmpfs", "none", over=folder / "run"):
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("shared-folder", "node3", "fail")}
    assert "run is another folder there" in said.says("shared-folder", "node3")
    with ExitStack() as stack:
        stack.enter_context(mounted(cluster.hosts[1], "--bind", folder / "run", over=folder / "run"))
        cluster.hosts[1].run(["mount", "-o", "remount,bind,ro", folder / "run"])
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("disk", "node2", "fail")}
    assert "run cannot be written to: Read-only file system" in said.says("disk", "node2")


def test_a_small_or_full_disk(cluster: Cluster, folder: Path, nano: Path) -> None:
    with mounted(cluster.hosts[0], "-t", "tmpfs", "-o", "size=20m", "none", over=folder / "run"):
        cluster.hosts[0].run(["dd", "if=/dev/zero", f"of={folder}/run/full", "bs=1M", "count=17"])
        alone = ("--save_model_path", "run", "--model", nano)
        said = ask(cluster.hosts[0], *alone, cwd=folder)
    assert said.bad == {("disk", "localhost", "fail")}
    assert "No space left on device" in said.says("disk", "localhost")
    with mounted(cluster.hosts[0], "-t", "tmpfs", "-o", "size=100m", "none", over=folder / "run"):
        cluster.hosts[0].run(["dd", "if=/dev/zero", f"of={folder}/run/full", "bs=1M", "count=30"])
        said = ask(cluster.hosts[0], *alone, "--keep_checkpoints", 6, cwd=folder)
    assert said.bad == {("disk", "localhost", "warn")}
    assert "7 checkpoints and the model of" in said.says("disk", "localhost")


def test_a_model_or_records_that_one_host_does_not_see(cluster: Cluster, folder: Path, nano: Path, mixed: Path) -> None:
    shutil.copytree(nano, folder / "shared/model")
    shutil.copytree(mixed.parent, folder / "shared/data")
    words = (*QUICK, "--model", "shared/model", "--data_path", f"shared/data/{mixed.name}")
    with mounted(cluster.hosts[1], "-t", "tmpfs", "none", over=folder / "shared"):
        said = ask(cluster.hosts[0], *words, cwd=folder)
    assert said.bad == {("model", "node2", "fail"), ("data", "node2", "fail")}
    assert "--model shared/model: no such folder" in said.says("model", "node2")
    weights = folder / "shared/model/model.safetensors"
    weights.with_name("cut").write_bytes(weights.read_bytes()[:-100])
    with mounted(cluster.hosts[2], "--bind", weights.with_name("cut"), over=weights):
        said = ask(cluster.hosts[0], *words, cwd=folder)
    assert said.bad == {("model", "node3", "fail")}
    assert "model.safetensors is cut off, or damaged" in said.says("model", "node3")
    with mounted(cluster.hosts[0], "--bind", weights.with_name("cut"), over=weights):
        said = ask(cluster.hosts[0], *words, cwd=folder)
    # The launching host reads the files as the run would.
    assert said.bad == {("model", "here", "fail")}


# Limits, ports, locks, environment


def test_small_shared_memory(cluster: Cluster, folder: Path) -> None:
    host = cluster.hosts[1]
    host.run(["mount", "-o", "remount,size=64m", "/dev/shm"])
    try:
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    finally:
        host.run(["mount", "-o", "remount,size=50%", "/dev/shm"])
    assert said.bad == {("shm", "node2", "fail")}
    assert "/dev/shm has 67.1 MB free for 1 slot(s)" in said.says("shm", "node2")


def test_a_low_ulimit(cluster: Cluster, folder: Path) -> None:
    host = cluster.hosts[2]
    pid = str(sshd_of(host))
    old = host.run(["prlimit", "--pid", pid, "--nofile", "--noheadings", "--output", "SOFT,HARD"]).stdout.split()
    host.run(["prlimit", "--pid", pid, f"--nofile=1024:{old[1]}"])
    try:
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    finally:
        host.run(["prlimit", "--pid", pid, f"--nofile={':'.join(old)}"])
    assert said.bad == {("ulimits", "node3", "warn")}
    assert "ulimit -n is 1024" in said.says("ulimits", "node3")


def test_a_taken_master_port(cluster: Cluster, folder: Path) -> None:
    code = "import socket, time; s = socket.create_server(('', 29777)); time.sleep(100)"
    cluster.hosts[0].start([PYTHON, "-c", code])
    listening = "0A"
    wait_until(
        lambda: f":{29777:04X} 00000000:0000 {listening}" in cluster.hosts[0].run(["cat", "/proc/net/tcp"]).stdout,
        "port",
    )
    # Bandwidth is measured all the same, on another port.
    words = ("--hostfile", "hosts", "--save_model_path", "run", "--master_port", 29777)
    said = ask(cluster.hosts[0], *words, cwd=folder)
    # How fast the links are is not asked here: the other suites may load them.
    assert {one for one in said.bad if one[0] != "bandwidth"} == {("master", "node1", "fail")}
    assert "port 29777 cannot be listened on: Address already in use" in said.says("master", "node1")
    assert said.everything["bandwidth"]["faults"] == {}


def test_a_stale_compile_lock(cluster: Cluster, folder: Path) -> None:
    lock = cluster.home / ".cache/torch_extensions/py311_cpu/fused_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 1000,) * 2)
    try:
        said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    finally:
        shutil.rmtree(cluster.home / ".cache")
    # Their home is shared, so each of them waits on it.
    assert said.bad == {("locks", host.name, "fail") for host in cluster.hosts}
    assert f"rm {lock}" in said.says("locks", "node2")


def test_a_faulty_environment_file(cluster: Cluster, folder: Path) -> None:
    (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n# threads\nOMP_NUM_THREADS=1\n")
    said = ask(cluster.hosts[0], *QUICK, cwd=folder)
    assert said.bad == {("deepspeed-env", "here", "fail")}
    assert ".deepspeed_env line 2: '# threads' is not NAME=value" in said.says("deepspeed-env", "here")


def test_variables_that_ssh_does_not_carry(cluster: Cluster, folder: Path) -> None:
    said = ask(cluster.hosts[0], *QUICK, cwd=folder, OMP_NUM_THREADS="1")
    assert said.bad == {("environment", host.name, "warn") for host in cluster.hosts}
    assert "OMP_NUM_THREADS: set here, not or otherwise there; python -m mirage_ds.cluster.environment" in said.says(
        "environment", "node2"
    )
    # And the cure helps.
    out, variables = folder / "made_env", {"OMP_NUM_THREADS": "1", "NCCL_X": "a \"b\" $HOME %h 'c'"}
    made = [PYTHON, "-m", "mirage_ds.cluster.environment", "--out", out]
    cluster.hosts[0].run(made, cwd=folder, env={**CPU, **variables})
    said = ask(cluster.hosts[0], *QUICK, cwd=folder, DS_ENV_FILE=str(out), **variables)
    assert said.bad == set()


# Bandwidth


def test_a_slow_link_is_found(cluster: Cluster, folder: Path) -> None:
    """200 Mbit/s out of node2, everybody else as fast as memory."""
    host = cluster.hosts[1]
    host.run(["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *SLOW])
    try:
        said = ask(cluster.hosts[0], "--hostfile", "hosts", "--only", "bandwidth", cwd=folder)
    finally:
        host.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert said.bad == {("bandwidth", "node2", "warn")}
    rates = {tuple(pair[:2]): pair[2] for pair in said.everything["bandwidth"]["pairs"]}
    # A direction carries 25 MB/s.
    assert 10e6 < rates["node1", "node2"] < 40e6
    assert 10e6 < rates["node2", "node3"] < 40e6


def test_a_master_address_that_leads_nowhere_is_told_in_time(cluster: Cluster, folder: Path) -> None:
    words = ("--hostfile", "hosts", "--master_addr", "10.97.0.99", "--only", "bandwidth")
    said = ask(cluster.hosts[0], *words, cwd=folder)
    assert said.bad >= {("bandwidth", "node2", "fail"), ("bandwidth", "node3", "fail")}
    assert "at 10.97.0.99:29501 was not reached within" in said.says("bandwidth", "node2")
    assert "let the hosts reach 10.97.0.99 on any port" in said.says("bandwidth", "node2")
    assert said.seconds < 2 * SILENT_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_goes_on_when_the_doctor_is_ended_amid_the_measurement(
    number: signal.Signals, cluster: Cluster, folder: Path
) -> None:
    (folder / "hosts").write_text("node1 slots=2\nnode2 slots=2\nnode3 slots=2\n")
    words = [*DOCTOR, "--hostfile", "hosts", "--only", "bandwidth"]
    process = cluster.hosts[0].start(words, cwd=folder, env=CPU)

    def ranks() -> int:
        # Each in its guard.
        return sum("doctor.bandwidth" in command for _, command in cluster.processes())

    wait_until(lambda: ranks() >= 12, "ranks", 30)
    process.send_signal(number)
    process.wait(10)
    wait_until(lambda: cluster.processes() == [], "end of every process", 10)


def test_a_cable_cut_amid_the_measurement_ends_it(cluster: Cluster, folder: Path) -> None:
    process = cluster.hosts[0].start(
        [*DOCTOR, "--json", "--hostfile", "hosts", "--only", "bandwidth"],
        cwd=folder,
        env=CPU,
        stdout=folder / "log",
        stderr=subprocess.DEVNULL,
    )
    node3 = cluster.hosts[2]
    wait_until(
        lambda: sum("doctor.bandwidth" in command for _, command in node3.processes()) >= 2, "ranks on node3", 30
    )
    node3.cut_cable()
    begin = time.monotonic()
    process.wait(120)
    assert time.monotonic() - begin < 75
    assert process.returncode == 2
    (found,) = json.loads((folder / "log").read_text())["findings"]
    assert (found["check"], found["host"], found["status"]) == ("bandwidth", "node3", "fail")
    for host in cluster.hosts[:2]:
        wait_until(lambda host=host: host.processes() == [], f"end of {host.processes()}", 10)


# Slurm


def slurm_doctor(slurm: Slurm, *words: object, cwd: Path) -> Said:
    nodes = len(slurm.nodes)
    allocation = ("salloc", "-Q", "-N", str(nodes), "--ntasks-per-node=1")
    return ask(slurm.login, "--slurm", *words, cwd=cwd, before=allocation)


def test_slurms_nodes_are_looked_at_from_inside_the_job(slurm: Slurm, folder: Path, nano: Path) -> None:
    said = slurm_doctor(slurm, "--save_model_path", "run", "--model", nano, cwd=folder)
    assert (said.code, said.bad) == (0, set())
    assert [host["name"] for host in said.everything["hosts"]] == [node.name for node in slurm.nodes]
    assert [pair[:2] for pair in said.everything["bandwidth"]["pairs"]] == [[node.name for node in slurm.nodes]]
    with mounted(slurm.nodes[1], "-t", "tmpfs", "none", over=folder / "run"):
        said = slurm_doctor(slurm, "--save_model_path", "run", "--no_bandwidth", cwd=folder)
    assert said.bad == {("shared-folder", slurm.nodes[1].name, "fail")}


def test_outside_a_slurm_job_it_says_so(slurm: Slurm, folder: Path) -> None:
    done = slurm.login.run([*DOCTOR, "--slurm"], check=False, cwd=folder, env=CPU)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --slurm: not inside a Slurm job; call it in the job's script, or after salloc\n"
