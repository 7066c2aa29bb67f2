"""Running a study: every node once, those that are ready side by side, until nothing is left that can run.

A node is ready when the node whose model it needs is done. One that fails is tried as often as the study says; what
hangs on it stays undone, and everything else goes on. A stop is passed on to the nodes, which save where they can, and
the next start continues there. A node's process has its lock too: where this one is killed and the node lives on, the
next start leaves it alone and takes what it leaves. A place is the part of this machine, or of a hostfile, where a node
runs. Imports no torch.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import quote

from mirage_ds.cluster.environment import render
from mirage_ds.cluster.here import Job, free_ports, this_machine, visible_gpus
from mirage_ds.cluster.hosts import Host, read_hosts
from mirage_ds.errors import EXIT_STOPPED, UserError, reason
from mirage_ds.files import write_atomically
from mirage_ds.study.nodes import Node, Study, is_text
from mirage_ds.study.store import Store

LOOK_S = 0.1
# Other processes' nodes are looked at as often.
OTHERS_S = 2.0
# What a stopped node may take to save.
GRACE_S = 600.0

Say = Callable[[str], None]
Look = Callable[[list[Node]], None]


class Place(NamedTuple):
    """Where one node runs at a time.

    Attributes:
        ranks: of a training stage.
        devices: the GPUs that it may see, as CUDA_VISIBLE_DEVICES names them; None where it may see all (or there is
            none).
        hosts: of a hostfile; none for this machine alone.
        threads: of a rank.
    """

    ranks: int
    devices: tuple[str, ...] | None = None
    hosts: tuple[Host, ...] = ()
    threads: int = 1

    @property
    def name(self) -> str:
        """For people."""
        if self.hosts:
            return ", ".join(host.name for host in self.hosts)
        return "here" if self.devices is None else f"GPU {','.join(self.devices)}"

    def of(self, node: Node) -> Self:
        """Return what of it a node uses: an evaluation is one process, on the first GPU of the first host."""
        if node.kind == "train":
            return self
        first = tuple(Host(host.name, 1) for host in self.hosts[:1])
        return self._replace(ranks=1, devices=self.devices and self.devices[:1], hosts=first)


def here(ranks: int, jobs: int | None, gpus: Sequence[str], cores: int) -> list[Place]:
    """Divide this machine: as many places as fit, or as were asked for.

    Args:
        ranks: of a training run; gpus, cores: that there are. Without GPUs a rank is a core.

    Raises:
        UserError: a run has more ranks than there are GPUs.
    """
    if gpus and ranks > len(gpus):
        raise UserError(f"launch.ranks {ranks}: there are {len(gpus)} GPUs here; lower it, or name a --hostfile")
    count = jobs or max(1, (len(gpus) or cores) // ranks)
    threads = max(1, cores // (count * ranks))
    ring = itertools.cycle(gpus)
    return [Place(ranks, tuple(itertools.islice(ring, ranks)) or None, threads=threads) for _ in range(count)]


def parts(hosts: Sequence[Host], each: int) -> list[Place]:
    """Divide a hostfile into places of so many hosts; a rest that is too small stays idle."""
    chunks = [tuple(hosts[at : at + each]) for at in range(0, len(hosts) - each + 1, each)]
    return [Place(sum(host.slots for host in chunk), None, chunk) for chunk in chunks]


def places(study: Study, ranks: int, jobs: int | None, hostfile: Path | None, hosts_per_run: int) -> list[Place]:
    """Return where a study's nodes run: on this machine, or on the hosts of a hostfile.

    Raises:
        UserError: a run needs more GPUs or hosts than there are.
    """
    if hostfile is None:
        gpus = visible_gpus({**os.environ, **study.spec.launch.environment})
        return here(ranks, jobs, gpus, len(os.sched_getaffinity(0)))
    found = parts(read_hosts(hostfile), hosts_per_run)
    if not found:
        raise UserError(f"--hosts_per_run {hosts_per_run}: {hostfile} has fewer hosts; lower it")
    return found[:jobs]


def environment(place: Place, folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a node: this process's, with what the study and the place set.

    On a part of a hostfile, what DeepSpeed's launcher reads is written too, as launch/deepspeed.sh does.

    Args:
        folder: of the node; given: of the study, which the ranks of other hosts get in any case.
    """
    found = {"OMP_NUM_THREADS": str(place.threads), "TOKENIZERS_PARALLELISM": "false", **os.environ, **given}
    if place.devices is not None and place.ranks == 1:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(place.devices)
    elif place.devices is not None:
        # The launcher is told which they are by number, among all that there are.
        found.pop("CUDA_VISIBLE_DEVICES", None)
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', '')}"
    if place.hosts:
        write_atomically(folder / "hosts", "".join(f"{host.name} slots={host.slots}\n" for host in place.hosts))
        write_atomically(folder / "deepspeed_env", render(found, given))
        found["DS_ENV_FILE"] = str(folder / "deepspeed_env")
        patient = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
        found["PDSH_SSH_ARGS_APPEND"] = f"{found.get('PDSH_SSH_ARGS_APPEND', '')} {patient}"
    return found


def _launched(module: list[str], folder: Path, place: Place) -> list[str]:
    """Return the command that starts a module and its arguments at a place."""
    if place.ranks == 1 and not place.hosts:
        return [sys.executable, "-m", *module]
    port = free_ports()
    job = Job(f"{folder.name}-{port}", port)
    if place.hosts:
        # pdsh hands the words to a shell: quoted, none of them means anything to it.
        module = [quote(word, safe="/=,:@+") for word in module]
        job = job._replace(master=place.hosts[0].address)
        there = ["--hostfile", str(folder / "hosts"), "--force_multi"]
        words = job.through_deepspeed(there, module, ["--logs", str(folder / "logs"), "--quoted"])
    else:
        words = job.through_deepspeed(this_machine(place.ranks, place.devices), module)
    return [sys.executable, "-m", "mirage_ds.cluster.guard.launch", *words]


def command(node: Node, store: Store, place: Place) -> list[str]:
    """Return the command line of a node."""
    folder, asked = store.place(node), node.evaluation
    if node.parent is None or asked is None:
        return _launched(["mirage_ds.train", "--config", str(folder / "config.yaml")], folder, place)
    flags = asked.model_dump(
        include={"data_path", "columns", "task", "most", "max_new_tokens", "batch_size", "image_root"}
    )
    flags["out"] = store.result(node)
    if node.kind == "controls":
        flags |= {name: getattr(node.config, name) for name in ("helper_min_pixels", "helper_max_pixels")}
        flags |= {"latents": asked.controls, "most": asked.controls_most or asked.most}
        flags |= {"latent_targets": node.targets and store.model(node.targets)}
    words = ["mirage_ds", node.kind, str(store.model(node.parent))]
    for name, value in flags.items():
        words += [f"--{name}", str(value)] if value is not None else []
    # Whatever else is in its slots, such as pauses, a model that has some opens latent blocks.
    if node.kind == "evaluate" and is_text(node.parent):
        words.append("--no_latents")
    return _launched(words, folder, place)


class Running(NamedTuple):
    """A node at work."""

    node: Node
    place: Place
    process: subprocess.Popen[bytes]
    held: ExitStack
    begun: float


def why(log: Path, code: int) -> str:
    """Say why a node failed: the last line of what it printed that says so, else its last line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        # Of the last attempt alone, which begins with its command.
        text = file.read().decode(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    last = (errors or lines or ["it printed nothing"])[-1]
    return f"exit code {code}: {last.removeprefix('error: ')[:300]}"


class Runner:
    """What runs, what is free, what is left.

    Args:
        places: where nodes run, one at a time in each.
        say: is told when a node begins and ends.
        keys: of what is wanted; all nodes if None.
    """

    def __init__(
        self, study: Study, store: Store, places: Sequence[Place], say: Say, keys: Iterable[str] | None = None
    ):
        self.study, self.store, self.say = study, store, say
        self.keys = list(study.nodes if keys is None else keys)
        self.free, self.working = list(places), list[Running]()
        self.stopping_since: float | None = None

    def run(
        self, asked: Callable[[], bool] = lambda: False, patient: bool = True, look: Look = lambda nodes: None
    ) -> bool:
        """Run what is not done. However it leaves, no node goes on without it, unless this process itself is killed.

        Args:
            asked: whether somebody wants this process to stop.
            patient: wait for wanted nodes that other processes work at.
            look: is told every other second which nodes are at work here.

        Returns:
            False where it was stopped.

        Raises:
            UserError: the study's folder cannot be written to.
        """
        try:
            return self._until_done(asked, patient, look)
        except OSError as error:
            where = error.filename or self.store.root
            raise UserError(f"{where}: {reason(error)}; its runs were stopped; the same command goes on") from None
        finally:
            # Without a word: this process can go on no more.
            while any(one.process.poll() is None for one in self.working):
                self._stop()
                time.sleep(LOOK_S)
            for one in self.working:
                one.held.close()

    def _until_done(self, asked: Callable[[], bool], patient: bool, look: Look) -> bool:
        look_at, told = 0.0, False
        while True:
            if self._collect():
                self._forget_ended()
                look_at = 0.0
            if asked():
                if self.stopping_since is None and self.working:
                    self.say(f"stopping: {len(self.working)} node(s) save and leave")
                self._stop()
                if not self.working:
                    return False
            elif time.monotonic() >= look_at:
                look_at = time.monotonic() + OTHERS_S
                self._begin()
                look([one.node for one in self.working])
                if not self.working:
                    # Those that other processes work at.
                    others = sum(self.store.state(self.study.nodes[key]) == "running" for key in self.keys)
                    if not others or not patient:
                        return True
                    if not told:
                        told = True
                        self.say(f"waiting for {others} run(s) that another process works at")
            time.sleep(LOOK_S)

    def _collect(self) -> bool:
        """Write down the nodes that have ended; whether there were any."""
        ended = [(one, code) for one in self.working if (code := one.process.poll()) is not None]
        for one, code in ended:
            self.working.remove(one)
            self.free.append(one.place)
            with one.held:
                self._write_down(one, code)
        return bool(ended)

    def _write_down(self, one: Running, code: int) -> None:
        took = f"{time.time() - one.begun:.0f} s"
        if code == 0 and self.store.is_whole(one.node):
            self.store.finish(one.node, one.begun)
            self.say(f"{one.node.folder}: {took}")
            return
        # However it ends once it was asked to stop, that is no failure: the request may meet it before it listens.
        stopping = self.stopping_since is not None
        failed = why(self.store.log(one.node), code)
        self.store.ended(one.node, one.begun, EXIT_STOPPED if stopping else code, failed)
        self.say(f"{one.node.folder} {'stopped' if stopping else 'failed'} after {took}: {failed}")

    def _forget_ended(self) -> None:
        """Leave alone what is done or has failed for good."""
        self.keys = [key for key in self.keys if self.store.state(self.study.nodes[key]) not in ("done", "failed")]

    def _begin(self) -> None:
        """Start what can start."""
        while self.free and (node := self._ready()):
            if started := self._start(node, self.free[0]):
                self.working.append(started)
                self.free.pop(0)
                self.say(f"{node.folder} begins, {started.place.of(node).name}")
            else:
                self._forget_ended()

    def _ready(self) -> Node | None:
        """Return the first node that can start now."""
        busy = {one.node.key for one in self.working}
        for key in self.keys:
            node = self.study.nodes[key]
            can_start = all(map(self.store.is_done, node.needs))
            if key not in busy and can_start and self.store.state(node) == "waiting":
                return node
        return None

    def _start(self, node: Node, place: Place) -> Running | None:
        """Start a node; None where another process works at it, or it has been done meanwhile."""
        store, used = self.store, place.of(node)
        with ExitStack() as held:
            lock = held.enter_context(store.hold(node))
            if lock is None or store.is_done(node):
                return None
            store.prepare(node)
            begun = time.time()
            if store.is_whole(node):
                # Its process ended well and ours did not live to write it down.
                store.finish(node, begun)
                return None
            log = held.enter_context(store.log(node).open("ab"))
            words = command(node, store, used)
            log.write(f"\n$ {' '.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(used, store.place(node), self.study.spec.launch.environment),
                # A Ctrl-C of the terminal reaches this process alone, which passes it on.
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
            return Running(node, place, process, held.pop_all(), begun)

    def _stop(self) -> None:
        """Ask what runs to stop, once; end what does not listen, with all that it started."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            for one in self.working:
                one.process.send_signal(signal.SIGTERM)
        elif time.monotonic() - self.stopping_since > GRACE_S:
            for one in self.working:
                if one.process.poll() is None:
                    os.killpg(one.process.pid, signal.SIGKILL)
