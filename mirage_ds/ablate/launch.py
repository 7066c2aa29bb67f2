"""How a node of a study starts: its command line and environment, on a part of this machine or of a hostfile.

Imports no torch.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from mirage_ds.ablate.nodes import Node
from mirage_ds.ablate.store import Store
from mirage_ds.files import write_atomically
from mirage_ds.hosts import Host
from mirage_ds.remote_env import render


class Place(NamedTuple):
    """Where one node runs at a time.

    Attributes:
        ranks: of a training stage.
        devices: numbers of the GPUs that it may see; None where it may see all (or there is none).
        hosts: of a hostfile; none for this machine alone.
    """

    ranks: int
    devices: tuple[int, ...] | None = None
    hosts: tuple[Host, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        if self.hosts:
            return ", ".join(host.name for host in self.hosts)
        return "here" if self.devices is None else f"GPU {','.join(map(str, self.devices))}"


def here(ranks: int, jobs: int | None, gpus: int, cores: int) -> list[Place]:
    """Divide this machine: as many places as fit, or as were asked for.

    Args:
        ranks: of a training run; gpus, cores: that there are. Without GPUs a rank is a core.
    """
    if not gpus:
        return [Place(ranks)] * (jobs or max(1, cores // ranks))
    most = jobs or max(1, gpus // ranks)
    return [
        Place(ranks, tuple((number * ranks + rank) % gpus for rank in range(min(ranks, gpus))))
        for number in range(most)
    ]


def parts(hosts: Sequence[Host], each: int) -> list[Place]:
    """Divide a hostfile into places of so many hosts; a rest that is too small stays idle."""
    chunks = [tuple(hosts[at : at + each]) for at in range(0, len(hosts) - each + 1, each)]
    return [Place(sum(host.slots for host in chunk), None, chunk) for chunk in chunks]


def free_ports() -> int:
    """Return a port of two neighbours that nobody listens on: of the ranks, and of their guards."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def environment(place: Place, given: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the environment of a node: this process's, with what the study and the place set."""
    found = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ, **given}
    if place.devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.devices))
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', '')}"
    return found


def for_hosts(folder: Path, place: Place, found: Mapping[str, str]) -> dict[str, str]:
    """Write what DeepSpeed's launcher reads for a part of a hostfile, as launch/deepspeed.sh does.

    Args:
        folder: of the node; found: the environment that the ranks are to have.

    Returns:
        What the launcher's own environment has besides.
    """
    write_atomically(folder / "hosts", "".join(f"{host.name} slots={host.slots}\n" for host in place.hosts))
    write_atomically(folder / "deepspeed_env", render(found))
    patient = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    return {
        "DS_ENV_FILE": str(folder / "deepspeed_env"),
        "PDSH_SSH_ARGS_APPEND": f"{found.get('PDSH_SSH_ARGS_APPEND', '')} {patient}",
    }


def _trained(folder: Path, place: Place) -> list[str]:
    module = ["mirage_ds.train", "--config", str(folder / "config.yaml")]
    if place.ranks == 1 and not place.hosts:
        return [sys.executable, "-m", *module]
    port = free_ports()
    master = place.hosts[0].name if place.hosts else "127.0.0.1"
    guard = ["--port", str(port + 1), "--job", f"{folder.name}-{port}"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    own = ["--module", "mirage_ds.guard", *guard]
    if place.hosts:
        launcher += ["--hostfile", str(folder / "hosts"), "--force_multi"]
        # pdsh hands the words to a shell: quoted, none of them means anything to it.
        own += ["--logs", str(folder / "logs"), "--quoted"]
        module = [quote(word, safe="/=,:@+") for word in module]
    else:
        launcher += ["--hostfile", "/nonexistent", "--num_accelerators", str(place.ranks)]
    return [
        *(sys.executable, "-m", "mirage_ds.guard.launch", "--master", master, *guard),
        *(*launcher, "--no_local_rank", "--master_addr", master, "--master_port", str(port), *own, *module),
    ]


def command(node: Node, parent: Node | None, store: Store, place: Place) -> list[str]:
    """Return the command line of a node.

    Args:
        parent: the node whose model it starts from, or evaluates.
    """
    if node.kind == "train":
        return _trained(store.place(node), place)
    assert parent is not None
    assert node.evaluation is not None
    asked = node.evaluation
    entry = "import sys; from mirage_ds.cli import main; sys.argv[0] = 'mirage-ds'; main()"
    words = [sys.executable, "-c", entry, node.kind, str(store.model(parent)), "--data_path", str(asked.data_path)]
    words += ["--out", str(store.result(node)), "--max_new_tokens", str(asked.max_new_tokens)]
    words += ["--batch_size", str(asked.batch_size)]
    most = asked.most
    if node.kind == "controls":
        words += ["--latents", ",".join(node.conditions)]
        most = asked.controls_most or most
        assert node.config is not None
        for name in ("helper_min_pixels", "helper_max_pixels"):
            if (value := getattr(node.config, name)) is not None:
                words += [f"--{name}", str(value)]
    elif not sees_latents(parent):
        words += ["--no_latents"]
    for name, value in (("task", asked.task), ("most", most), ("image_root", asked.image_root)):
        words += [f"--{name}", str(value)] if value is not None else []
    return words


def sees_latents(node: Node) -> bool:
    """Tell whether a trained model opens runs: of latents, of pauses, or bare marks."""
    assert node.config is not None
    return node.config.stage != "sft" or node.config.slots is not None
