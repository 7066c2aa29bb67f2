"""Several hosts on one machine, for real launchers: Linux namespaces on a virtual switch. Needs root.

    with Cluster(count=3, folder=tmp_path) as cluster:
        node1, node2, node3 = cluster.hosts
        node1.run(["ssh", "node2", "hostname"]).stdout   # "node2\n"
        job = node1.start(["pdsh", "-w", "node[2-3]", "sleep 100"], stdout=tmp_path / "log")
        node2.power_off()

    python -m tests.cluster.hosts 3      # by hand: a shell on node1; the cluster ends with it

A host has its own network, mounts, name, shared memory and processes, and sshd on its own address. The file system is
shared, except /proc, /sys, /run, /dev/shm and /etc, which says that the user's home is a folder of the cluster's. Not
modelled: separate CPUs, clocks and disks.

Nothing of it has a name on the machine: the switch is a network namespace that only this process holds open, and each
host's PID 1 dies with the thread that booted it. So nothing is left behind, not even by a test killed with -9, and
clusters can stand beside each other. The price: boot hosts in a thread that outlives them.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from . import namespaces

NETWORK = "10.97.0"  # hosts are .1, .2, …
# What a login gives, and no more: what a launcher does not carry over is not there.
LOGIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_S = 20
SSHD_LISTENS = ":0016 00000000:0000 0A"  # a line of /proc/net/tcp: port 22, no peer, state LISTEN
HOST_KINDS = namespaces.NET | namespaces.MOUNT | namespaces.UTS | namespaces.IPC
# Own processes of a service, which only it can start.
SERVICE_HELPERS = {"slurmscriptd"}
# No name server: a name that is not in /etc/hosts is unknown at once.
NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"
SSHD = """\
HostKey {folder}/host_key
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
UseDNS no
MaxStartups 100
PrintMotd no
PrintLastLog no
Subsystem sftp internal-sftp
"""


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = BOOT_S, every_s: float = 0.02) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it does not hold in time; the message says `what` was waited for.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(every_s)


def _ip(place: int, *commands: str) -> None:
    """Run commands of ip(8) in the network namespace of a descriptor."""
    done = subprocess.run(
        ["ip", "-batch", "-"],
        input="\n".join(commands),
        preexec_fn=lambda: namespaces.enter(place, namespaces.NET),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ip {commands}: {done.stderr}")


class Host:
    """One host of a cluster, with a power button.

    Attributes:
        name: its host name, by which the others know it.
        ip: its address on eth0.
    """

    def __init__(self, name: str, number: int, folder: Path, switch: int):
        self.name = name
        self.ip = f"{NETWORK}.{number}"
        # Kept over a power loss: the others remember it for a while.
        self._mac = f"02:00:0a:61:00:{number:02x}"
        self._folder = folder
        self._switch = switch
        self._init: subprocess.Popen[str] | None = None
        self._pidfd = -1
        self._started: list[subprocess.Popen[str]] = []
        self._services: dict[str, Sequence[str | Path]] = {}
        self._serving: dict[str, subprocess.Popen[str]] = {}
        self.add_service("sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"])

    @property
    def is_on(self) -> bool:
        return self._init is not None

    def log(self, service: str) -> Path:
        """Return the file with what a service, or PID 1 ("init"), has said."""
        return self._folder / "logs" / f"{self.name}.{service}.log"

    # Power and cable

    def power_on(self) -> None:
        """Boot: PID 1, network, services. Returns when sshd listens."""
        self._begin_boot()
        self._end_boot()

    def _begin_boot(self) -> None:
        assert not self.is_on, f"{self.name} is on"

        def become_host() -> None:
            namespaces.leave(HOST_KINDS)
            namespaces.die_with_parent()
            socket.sethostname(self.name)

        with self.log("init").open("a") as log, namespaces.children_in(None):
            init = subprocess.Popen(
                [sys.executable, "-I", "-S", Path(__file__).with_name("init.py"), self._folder / "etc"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=become_host,  # noqa: PLW1509  # system calls only
            )
        self._init, self._pidfd = init, os.pidfd_open(init.pid)
        end = f"eth0 address {self._mac} netns {init.pid}"
        _ip(self._switch, f"link add {self.name} type veth peer name {end}", f"link set {self.name} master switch up")
        _ip(self._pidfd, "link set lo up", f"address add {self.ip}/24 dev eth0", "link set eth0 up")

    def _end_boot(self) -> None:
        assert self._init is not None
        assert self._init.stdout is not None
        with self._init.stdout as said:
            if said.readline() != "ready\n":
                raise RuntimeError(f"{self.name} does not boot: {self.log('init').read_text()}")
        for name in self._services:
            self._serve(name)
        sockets, sshd = Path(f"/proc/{self._init.pid}/net/tcp"), self._serving["sshd"]
        wait_until(lambda: SSHD_LISTENS in sockets.read_text() or sshd.poll(), f"sshd on {self.name}")
        if sshd.poll() is not None:
            raise RuntimeError(f"sshd of {self.name} has ended: {self.log('sshd').read_text()}")

    def power_off(self) -> None:
        """Power loss: everything on it dies at once and its peers hear nothing of it, neither FIN nor RST."""
        assert self.is_on, f"{self.name} is off"
        # First the cable: the kernel closes a killed process's sockets, and says so to whom it can reach.
        _ip(self._switch, f"link delete {self.name}")
        self.kill()
        self.reap()

    def kill(self) -> None:
        """End everything on it at once, without the silence of `power_off`; `reap` has to follow."""
        if self._init is not None:
            self._init.kill()

    def reap(self) -> None:
        """Wait until everything on it is gone; what the test started gets its exit code, -9."""
        if self._init is None:
            return
        # PID 1 ends last: it waits for all that entered, and those are the test's children to reap.
        with self._init:
            for process in self._started:
                process.wait()
        os.close(self._pidfd)
        self._init, self._started, self._serving = None, [], {}

    def cut_cable(self) -> None:
        """Take the link down at the switch: packets are lost in silence."""
        _ip(self._switch, f"link set {self.name} down")

    def mend_cable(self) -> None:
        _ip(self._switch, f"link set {self.name} up")

    # Commands

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: Path | int = subprocess.DEVNULL,
        stderr: int = subprocess.STDOUT,
    ) -> subprocess.Popen[str]:
        """Start a command as a login here would, and return it as a process like any other; it dies with the host.

        Its pid is the real one as seen from the test, and signals reach the command itself. It leads a process group:
        `os.killpg(process.pid, signal.SIGINT)` is a Ctrl-C.

        Args:
            argv: the command and its arguments; no shell reads them.
            env: added to what a login gives: PATH of the system, HOME, USER, LOGNAME, SHELL, LANG.
            cwd: the working directory, home by default.
            stdin: as in subprocess.
            stdout: a file to append to, or as in subprocess.
            stderr: as in subprocess; by default it goes where stdout goes.
        """
        assert self.is_on, f"{self.name} is off"
        pidfd, place = self._pidfd, cwd or self._folder / "home"
        user = pwd.getpwuid(os.getuid())
        login = {"USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": user.pw_shell}
        login |= {"PATH": LOGIN_PATH, "HOME": str(self._folder / "home"), "LANG": "C.UTF-8"}

        def enter() -> None:
            namespaces.enter(pidfd, HOST_KINDS)
            os.chdir(place)  # entering the mounts has led to /

        output = stdout if isinstance(stdout, int) else os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            with namespaces.children_in(pidfd):
                process = subprocess.Popen(
                    [str(word) for word in argv],
                    env={**login, **(env or {})},
                    stdin=stdin,
                    stdout=output,
                    stderr=stderr,
                    text=True,
                    start_new_session=True,
                    preexec_fn=enter,  # noqa: PLW1509  # system calls only
                )
        finally:
            if output is not stdout:
                os.close(output)
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | Path],
        timeout_s: float = 60,
        *,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return its output; see `start`.

        Raises:
            AssertionError: it failed (unless `check` is off), or it took longer and was killed with its process group.
        """
        process = self.start(argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        what = f"{self.name}: {' '.join(map(str, argv))}"
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as late:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            said = (late.output or b"") + (late.stderr or b"")
            raise AssertionError(f"{what}: not done within {timeout_s} s; it said {said!r}") from None
        if check and process.returncode:
            raise AssertionError(f"{what}: exit code {process.returncode}\n{out}{err}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def processes(self) -> list[tuple[int, str]]:
        """Return (pid as seen from the test, command line) of all that runs here besides PID 1 and the services."""
        if self._init is None:
            return []
        if self._init.poll() is not None:
            raise RuntimeError(f"PID 1 of {self.name} has ended: {self.log('init').read_text()}")
        own = {self._init.pid, *(process.pid for process in self._serving.values())}
        here = os.stat(f"/proc/{self._init.pid}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid in own or os.stat(f"/proc/{process.pid}/ns/pid").st_ino != here:
                    continue
                if process.name() not in SERVICE_HELPERS and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.pid, " ".join(process.cmdline())))
            except (psutil.NoSuchProcess, FileNotFoundError, PermissionError):  # ended meanwhile, or the machine's own
                continue
        return found

    def kill_commands(self) -> bool:
        """Kill what `processes` finds, and say whether there was nothing left to kill."""
        left = self.processes()
        for pid, _ in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    # Services

    def add_service(self, name: str, argv: Sequence[str | Path]) -> None:
        """Start a daemon (that stays in the foreground) now, if the host is on, and at each later boot."""
        self._services[name] = argv
        if self.is_on:
            self._serve(name)

    def _serve(self, name: str) -> None:
        self._serving[name] = self.start(self._services[name], stdout=self.log(name))

    def remove_service(self, name: str) -> None:
        """Kill a daemon, if it runs, and start it no more."""
        del self._services[name]
        if process := self._serving.pop(name, None):
            process.kill()
            process.wait()


class Cluster:
    """Hosts node1 … nodeN on one switch.

    Args:
        count: number of hosts.
        folder: where keys, home, configuration and logs are kept; it is made, and what an earlier cluster kept there
            is replaced. Default: a temporary folder, removed at the end.
    """

    def __init__(self, count: int, folder: Path | None = None):
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="cluster-"))
        self.home = self.folder / "home"
        self._count = count
        self._switch = -1
        self.hosts: list[Host] = []

    def __enter__(self) -> Cluster:
        self._switch = namespaces.new_network()
        self.hosts = [Host(name, number, self.folder, self._switch) for number, name in self._names()]
        try:
            self._write_files()
            _ip(self._switch, "link add switch type bridge", "link set switch up")
            for host in self.hosts:
                host._begin_boot()
            for host in self.hosts:
                host._end_boot()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    def _down(self) -> None:
        for host in self.hosts:
            host.kill()
        for host in self.hosts:
            host.reap()
        os.close(self._switch)
        if self._own_folder:
            shutil.rmtree(self.folder)

    def processes(self) -> list[tuple[int, str]]:
        """Return what `Host.processes` finds, of all hosts."""
        return [process for host in self.hosts for process in host.processes()]

    def repair(self) -> None:
        """Kill what commands have left running, mend cables, power on what is off."""
        for host in self.hosts:
            if not host.is_on:
                host.power_on()
            host.mend_cable()
            wait_until(host.kill_commands, f"end of the commands on {host.name}")

    def hostfile(self, path: Path, slots: int, hosts: Sequence[Host] | None = None) -> Path:
        """Write a hostfile of DeepSpeed and OpenMPI with so many slots a host, and return its path."""
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts or self.hosts))
        return path

    def _names(self) -> list[tuple[int, str]]:
        return [(number, f"node{number}") for number in range(1, self._count + 1)]

    def _write_files(self) -> None:
        """Write keys, home, and what lies over /etc."""
        for name in ("etc", "home", "logs", "tmp"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        ssh, etc = self.home / ".ssh", self.folder / "etc"
        ssh.mkdir(mode=0o700)
        for key in (self.folder / "host_key", ssh / "id_ed25519"):
            key.unlink(missing_ok=True)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cluster", "-f", key], check=True)
        host_key, user_key = (self.folder / "host_key.pub").read_text(), (ssh / "id_ed25519.pub").read_text()
        (ssh / "authorized_keys").write_text(user_key)
        (ssh / "known_hosts").write_text(f"node*,{NETWORK}.* {host_key}")
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        # OpenMPI leaves its session folders behind when it is killed.
        (self.home / ".openmpi").mkdir()
        (self.home / ".openmpi/mca-params.conf").write_text(f"orte_tmpdir_base = {self.folder / 'tmp'}\n")

        user = pwd.getpwuid(os.getuid())
        lines = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        homes = [[*line[:5], str(self.home), *line[6:]] if line[0] == user.pw_name else line for line in lines]
        (etc / "passwd").write_text("".join(":".join(line) + "\n" for line in homes))
        names = "".join(f"{NETWORK}.{number} {name}\n" for number, name in self._names())
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "nsswitch.conf").write_text(NSSWITCH)
        (etc / "resolv.conf").write_text("")
        # A link, since files may not change under /etc while hosts are up: Slurm's configuration is written later.
        (etc / "slurm").symlink_to(self.folder / "slurm")


def main() -> None:
    with Cluster(int(sys.argv[1])) as cluster:
        print(f"{' '.join(host.name for host in cluster.hosts)}, files in {cluster.folder}; exit ends the cluster")
        cluster.hosts[0].start(["ssh", "-t", "node1"], stdin=0, stdout=1, stderr=2).wait()


if __name__ == "__main__":
    main()
