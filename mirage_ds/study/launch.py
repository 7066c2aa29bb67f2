"""How a node of a study starts: its command line and environment, on a part of this machine or of a hostfile.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from mirage_ds.cluster.environment import render
from mirage_ds.cluster.here import Job, free_ports, this_machine
from mirage_ds.cluster.hosts import Host
from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically
from mirage_ds.study.nodes import Node
from mirage_ds.study.store import Store


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

    def of(self, node: Node) -> Place:
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
    if not gpus:
        return [Place(ranks, threads=threads)] * count
    return [
        Place(ranks, tuple(gpus[(number * ranks + rank) % len(gpus)] for rank in range(ranks)), threads=threads)
        for number in range(count)
    ]


def parts(hosts: Sequence[Host], each: int) -> list[Place]:
    """Divide a hostfile into places of so many hosts; a rest that is too small stays idle."""
    chunks = [tuple(hosts[at : at + each]) for at in range(0, len(hosts) - each + 1, each)]
    return [Place(sum(host.slots for host in chunk), None, chunk) for chunk in chunks]


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


def command(node: Node, parent: Node | None, store: Store, place: Place) -> list[str]:
    """Return the command line of a node.

    Args:
        parent: the node whose model it starts from, or evaluates.
    """
    if node.kind == "train":
        folder = store.place(node)
        return _launched(["mirage_ds.train", "--config", str(folder / "config.yaml")], folder, place)
    assert parent is not None
    assert node.evaluation is not None
    asked = node.evaluation
    flags = asked.model_dump(
        include={"data_path", "columns", "task", "most", "max_new_tokens", "batch_size", "image_root"}
    )
    flags["out"] = store.result(node)
    if node.kind == "controls":
        flags |= {name: getattr(node.config, name) for name in ("helper_min_pixels", "helper_max_pixels")}
        flags |= {"latents": asked.controls, "most": asked.controls_most or asked.most}
    words = ["mirage_ds", node.kind, str(store.model(parent))]
    for name, value in flags.items():
        words += [f"--{name}", str(value)] if value is not None else []
    if node.kind == "evaluate" and not sees_latents(node.config):
        words.append("--no_latents")
    return _launched(words, store.place(node), place)


def sees_latents(config: RunConfig) -> bool:
    """Tell whether a trained model opens latent blocks: of latents, of pauses, or bare marks."""
    return config.stage != "sft" or config.slots is not None
