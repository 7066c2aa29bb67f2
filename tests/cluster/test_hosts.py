"""The hosts themselves: what tests of launchers rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from . import conftest, hosts
from .hosts import LOGIN_PATH, Cluster, Host, wait_until
from .slurm import Slurm

pytestmark = pytest.mark.usefixtures("can_have_hosts")

REPO = Path(__file__).parents[2]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Waits for one connection, says hello, then echoes.
SERVER = """
import socket
with socket.create_server(("", 5000)) as door:
    peer, _ = door.accept()
    peer.sendall(b"hello")
    while said := peer.recv(100):
        peer.sendall(said)
"""
# Connects and reports each thing that the server says, or what becomes of the connection; sends what it is told to.
CLIENT = """
import socket, sys, threading
peer = socket.create_connection((sys.argv[1], 5000))
def listen():
    try:
        while said := peer.recv(100):
            print(said.decode(), flush=True)
        print("FIN", flush=True)
    except ConnectionResetError:
        print("RST", flush=True)
    except OSError as error:
        print(error, flush=True)
threading.Thread(target=listen, daemon=True).start()
for line in sys.stdin:
    peer.sendall(line.strip().encode())
"""


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def connect(client: Host, server: Host, log: Path) -> subprocess.Popen[str]:
    """Connect two hosts by TCP and return the client, whose log says "hello" then."""
    server.start(python(SERVER))
    wait_until(lambda: ":1388 " in server.run(["cat", "/proc/net/tcp"]).stdout, "server")
    process = client.start(python(CLIENT, server.ip), stdin=subprocess.PIPE, stdout=log)
    wait_until(lambda: log.exists() and "hello" in log.read_text(), "connection")
    return process


def say(client: subprocess.Popen[str], word: str) -> None:
    assert client.stdin is not None
    client.stdin.write(word + "\n")
    client.stdin.flush()


def machine() -> dict[str, object]:
    """Return what a cluster could leave behind on the machine itself."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    named = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    mounts = sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    own = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "mnt", "uts", "ipc", "pid_for_children")}
    return {"links": links, "named networks": named, "mounts": mounts, "own": own, "passwd": Path("/etc/passwd").stat()}


def namespaces_of(pids: list[int]) -> set[str]:
    return {os.readlink(f"/proc/{pid}/ns/pid") for pid in pids}


def living_in(namespaces: set[str]) -> list[int]:
    """Return the processes in pid namespaces. Dead ones, which their parent has not reaped, have no command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.readlink(f"/proc/{process.pid}/ns/pid") in namespaces and process.cmdline():
                found.append(process.pid)
        except (psutil.NoSuchProcess, OSError):
            continue
    return found


def command_lines(cluster: Cluster) -> set[str]:
    return {line for _, line in cluster.processes()}


# Up and down


def test_nothing_is_left_behind_and_up_and_down_are_fast(tmp_path: Path) -> None:
    before, descriptors = machine(), set(os.listdir("/proc/self/fd"))
    children = psutil.Process().children()
    begin = time.monotonic()
    with Cluster(count=3, folder=tmp_path) as cluster:
        up = time.monotonic()
        running = [host.start(["sleep", "1000"]) for host in cluster.hosts]
        # One that has left the command's session, and one that came over ssh.
        running += [cluster.hosts[0].start(["sh", "-c", "setsid sleep 1001 & ssh -f node2 sleep 1002"])]
        assert running[-1].wait(10) == 0
        places = namespaces_of([process.pid for process in running[:3]])
        assert len(places) == 3
        wait_until(lambda: {"sleep 1000", "sleep 1001", "sleep 1002"} <= command_lines(cluster), "all sleep")
        assert machine() == before
        end = time.monotonic()
    down = time.monotonic()
    print(f"up {up - begin:.2f} s, down {down - end:.2f} s")
    assert up - begin < 10
    assert down - end < 10
    assert living_in(places) == []
    assert psutil.Process().children() == children
    assert [process.returncode for process in running] == [-signal.SIGKILL] * 3 + [0]
    assert machine() == before
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_a_killed_test_leaves_nothing_and_the_next_is_up_in_the_same_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.cluster.hosts import Cluster\n"
        "with Cluster(2, Path(sys.argv[1])) as cluster:\n"
        "    cluster.hosts[0].start(['ssh', '-f', 'node2', 'sleep 1000']).wait()\n"
        "    print(*(host.start(['sleep', '1000']).pid for host in cluster.hosts), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    before = machine()
    with subprocess.Popen(python(code, str(tmp_path)), cwd=REPO, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        places = namespaces_of([int(word) for word in test.stdout.readline().split()])
        assert len(places) == 2
        assert len(living_in(places)) >= 2 * 3
        test.kill()
    wait_until(lambda: not living_in(places), "end of the killed test's hosts", timeout_s=5)
    assert machine() == before
    with Cluster(count=2, folder=tmp_path) as cluster:
        assert cluster.hosts[1].run(["ssh", "node1", "hostname"]).stdout == "node1\n"


def test_two_clusters_stand_beside_each_other(cluster: Cluster) -> None:
    with Cluster(count=1) as other:
        (alone,) = other.hosts
        assert alone.run(["ssh", "node1", "echo $HOME"]).stdout == f"{other.home}\n"
        assert alone.run(["ssh", "-o", "ConnectTimeout=1", cluster.hosts[1].ip, "true"], check=False).returncode == 255
        folder = other.folder
    assert not folder.exists()
    assert cluster.hosts[0].run(["ssh", "node1", "echo $HOME"]).stdout == f"{cluster.home}\n"


def test_a_host_that_cannot_boot_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "SSHD", "NoSuchOption yes\n")
    children = psutil.Process().children()
    with pytest.raises(RuntimeError, match=r"sshd of node1 has ended: (.|\n)*NoSuchOption"), Cluster(2, tmp_path):
        pass
    assert psutil.Process().children() == children


@pytest.mark.parametrize(("ci", "end"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_what_is_missing_is_said_in_one_sentence(ci: str, end: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "COMMANDS", ("ip", "no-such-command", "srun", "neither-this"))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(end, match=r"needs root .* tests/cluster/packages.txt; missing: no-such-command, neither-this$"):
        conftest.require_hosts()


# Commands


def test_a_command_is_run_as_by_a_login(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    node1 = cluster.hosts[0]
    names = node1.run(["env"], env={"ADDED": "1"}).stdout.split()
    assert sorted(line.split("=")[0] for line in names) == ["ADDED", "HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER"]
    assert f"PATH={LOGIN_PATH}" in names
    seen = node1.run(python("import os, socket; print(socket.gethostname(), os.getcwd(), os.path.expanduser('~root'))"))
    assert seen.stdout == f"node1 {cluster.home} {cluster.home}\n"
    assert node1.run(["pwd"], cwd=cluster.folder).stdout == f"{cluster.folder}\n"
    assert node1.run(["ls", "/sys/class/net"]).stdout.split() == ["eth0", "lo"]
    assert node1.run(["sh", "-c", "cat /etc/resolv.conf; test -w /etc/hosts"], check=False).returncode == 1


def test_a_failed_or_late_command_is_an_error(cluster: Cluster) -> None:
    node1 = cluster.hosts[0]
    with pytest.raises(AssertionError, match=r"node1: sh -c .*exit code 3\nout\nerr\n"):
        node1.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert node1.run(["sh", "-c", "exit 3"], check=False).returncode == 3
    with pytest.raises(AssertionError, match=r"not done within 0.3 s; it said .*begun"):
        node1.run(["sh", "-c", "echo begun; sleep 1000; true"], timeout_s=0.3)
    wait_until(lambda: not node1.processes(), "end of the late command")


def test_signals_reach_the_command_itself(cluster: Cluster, tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(number, lambda number, _: sys.exit(number))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )

    def ready(name: str, argv: list[str]) -> subprocess.Popen[str]:
        process = cluster.hosts[0].start(argv, stdout=tmp_path / name)
        wait_until(lambda: "ready" in (tmp_path / name).read_text(), name)
        return process

    process = ready("term", python(code))
    process.terminate()
    assert process.wait(5) == signal.SIGTERM
    process = ready("kill", python(code))
    process.kill()
    assert process.wait(5) == -signal.SIGKILL
    # Ctrl-C goes to the whole process group, here to a shell and its child.
    process = ready("int", ["sh", "-c", '"$@"; exit $?', "sh", *python(code)])
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(5) in (signal.SIGINT, -signal.SIGINT)
    assert cluster.processes() == []


def test_a_host_has_processes_of_its_own(cluster: Cluster) -> None:
    node1, node2, _ = cluster.hosts
    one, two = node1.start(["sleep", "1234"]), node2.start(["sleep", "1234"])
    assert node1.processes() == [(one.pid, "sleep 1234")]
    assert node2.processes() == [(two.pid, "sleep 1234")]
    node1.run(["pkill", "-f", "sleep 1234"])
    assert one.wait(5) == -signal.SIGTERM
    assert two.poll() is None
    # The host itself survives the broadest pattern, and reaps what has lost its parent.
    node2.run(["sh", "-c", "sleep 0.1 &"])
    node2.run(["pkill", "-9", "-f", "init.py|sleep 1234"])
    assert two.wait(5) == -signal.SIGKILL
    wait_until(
        lambda: node2.run(["ps", "--no-headers", "-o", "comm", "--ppid", "1"], check=False).stdout == "", "reaping"
    )
    assert node1.run(["ssh", "node2", "hostname"]).stdout == "node2\n"


def test_ssh_asks_nothing_and_keeps_quotes(cluster: Cluster) -> None:
    node1, node2, _ = cluster.hosts
    said = node1.run(["ssh", "node2", "printf '<%s>' 'a  b' \"$HOSTNAME\" \"$ADDED\""], env={"ADDED": "1"})
    assert (said.stdout, said.stderr) == ("<a  b><node2><>", "")
    assert node1.run(["ssh", node2.ip, "echo $HOME"]).stdout == f"{cluster.home}\n"
    assert node1.run(["ssh", "node2", "exit 7"], check=False).returncode == 7
    assert "not known" in node1.run(["ssh", "node9", "true"], check=False).stderr


# Power and cables


def lose_power(host: Host) -> None:
    host.power_off()


def end_server(host: Host) -> None:
    host.run(["pkill", "-9", "-f", "create_server"])


@pytest.mark.parametrize(("end", "heard"), [(lose_power, []), (end_server, ["FIN"])])
def test_a_power_loss_is_silent(
    end: Callable[[Host], None], heard: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    node1, node2, _ = cluster.hosts
    client = connect(node1, node2, tmp_path / "log")
    alive = node2.start(["sleep", "1000"])
    end(node2)
    time.sleep(2)
    assert (tmp_path / "log").read_text().split() == ["hello", *heard]
    assert client.poll() is None
    assert (alive.poll(), node2.is_on) == ((-signal.SIGKILL, False) if end is lose_power else (None, True))


def test_power_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    node1, node2, _ = cluster.hosts
    connect(node1, node2, tmp_path / "log")  # node1 knows node2's hardware address
    node2.power_off()
    assert node1.run(["ssh", "-o", "ConnectTimeout=1", "node2", "true"], check=False).returncode == 255
    assert node2.processes() == []
    node2.power_on()
    assert node1.run(["ssh", "-o", "ConnectTimeout=5", "node2", "hostname"]).stdout == "node2\n"
    assert "LISTEN" not in node2.run(["sh", "-c", "ls /dev/shm; pgrep -f create_server; true"]).stdout


def test_a_cut_cable_loses_packets_in_silence_until_it_is_mended(cluster: Cluster, tmp_path: Path) -> None:
    node1, node2, _ = cluster.hosts
    log = tmp_path / "log"
    client = connect(node1, node2, log)
    say(client, "one")
    wait_until(lambda: "one" in log.read_text(), "echo")
    node2.cut_cable()
    say(client, "two")
    time.sleep(1)
    assert log.read_text().split() == ["hello", "one"]
    assert node1.run(["ssh", "-o", "ConnectTimeout=1", "node2", "true"], check=False).returncode == 255
    assert node1.run(["ssh", "node3", "hostname"]).stdout == "node3\n"
    assert "create_server" in str(node2.processes())
    node2.mend_cable()
    wait_until(lambda: log.read_text().split() == ["hello", "one", "two"], "echo after mending", timeout_s=10)


def test_repair(cluster: Cluster) -> None:
    node1, node2, node3 = cluster.hosts
    node1.start(["sleep", "1000"])
    node2.cut_cable()
    node3.power_off()
    cluster.repair()
    assert cluster.processes() == []
    for host in cluster.hosts:
        assert node1.run(["ssh", "-o", "ConnectTimeout=5", host.name, "hostname"]).stdout == f"{host.name}\n"


# Launchers


def test_pdsh(cluster: Cluster) -> None:
    said = cluster.hosts[0].run(["pdsh", "-R", "ssh", "-w", "node[1-3]", "echo $HOSTNAME"]).stdout
    assert sorted(said.splitlines()) == ["node1: node1", "node2: node2", "node3: node3"]


def test_mpirun_and_nothing_left_in_tmp(cluster: Cluster, tmp_path: Path) -> None:
    node1, *others = cluster.hosts
    hostfile = cluster.hostfile(tmp_path / "hosts", slots=2, hosts=others)
    launch: list[str | Path] = ["mpirun", "--hostfile", hostfile, "-np", "4"]
    said = node1.run([*launch, "hostname"], env=AS_ROOT).stdout
    assert sorted(said.split()) == ["node2", "node2", "node3", "node3"]
    node1.start([*launch, "sleep", "1000"], env=AS_ROOT)
    wait_until(lambda: str(cluster.processes()).count("'sleep 1000'") == 4, "four ranks")
    cluster.repair()
    assert not list(Path("/tmp").glob("ompi.node*"))
    assert list((cluster.folder / "tmp").iterdir())


def test_srun_and_sbatch(slurm: Slurm, tmp_path: Path) -> None:
    said = slurm.login.run(["srun", "--nodes", "2", "--ntasks-per-node", "2", "hostname"]).stdout
    assert sorted(said.split()) == ["node2", "node2", "node3", "node3"]
    out = tmp_path / "out"
    sbatch: list[str | Path] = [
        "sbatch",
        "--nodes",
        "2",
        "--output",
        out,
        "--wrap",
        "srun --kill-on-bad-exit=1 hostname; exit 3",
    ]
    number = slurm.login.run([*sbatch, "--parsable"]).stdout.strip()
    wait_until(lambda: "ExitCode=3:0" in slurm.login.run(["scontrol", "show", "job", number]).stdout, "end of the job")
    assert sorted(out.read_text().split()) == ["node2", "node3"]


def test_a_job_makes_room_for_one_of_the_other_partition_and_comes_back(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrap = "echo ${SLURM_RESTART_COUNT:-0}; sleep 60"
    nodes = ["--nodes", "2", "--exclusive"]
    slurm.login.run(["sbatch", *nodes, "--requeue", "--output", out, "--open-mode", "append", "--wrap", wrap])
    wait_until(lambda: out.exists() and out.read_text() == "0\n", "start")
    assert slurm.login.run(["srun", "--partition", "high", *nodes, "hostname"], timeout_s=10).stdout.count("node") == 2
    wait_until(lambda: out.read_text().splitlines()[-1] == "1", "second start")
    assert "DUE TO PREEMPTION" in out.read_text()


def test_a_node_comes_back_with_its_daemons(slurm: Slurm) -> None:
    slurm.nodes[1].power_off()
    slurm.nodes[1].power_on()
    assert slurm.login.run(["srun", "--nodes", "2", "hostname"], timeout_s=20).stdout.count("node") == 2


def test_slurm_leaves_nothing(tmp_path: Path) -> None:
    with Cluster(2, tmp_path) as cluster:
        begin = time.monotonic()
        with Slurm(cluster) as slurm:
            up = time.monotonic()
            slurm.login.run(["sbatch", "--wrap", "setsid sleep 1000 & sleep 1001", "--output", tmp_path / "out"])
            wait_until(lambda: {"sleep 1000", "sleep 1001"} <= command_lines(cluster), "job")
            end = time.monotonic()
        print(f"Slurm up {up - begin:.2f} s, down {time.monotonic() - end:.2f} s")
        assert up - begin < 10
        assert cluster.processes() == []
