"""The memory of a host: a run that has no room for what is offloaded to it is refused before anything is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from mirage_ds.engine.setup import World, everyone, shared_fate
from mirage_ds.errors import UserError


def memory_to_be_had(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory and swap that processes here can still have, a control group's limit included."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    limits = [cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"]
    stated = [file.read_text().strip() for file in limits if file.is_file()]
    return min([free, *(int(text) for text in stated if text != "max")])


def check_offload(needed: int, json_path: Path, world: World) -> None:
    """Refuse a run that a host has no room for. All ranks call it; one rank of each host looks.

    Args:
        needed: bytes that offloading takes of the host's memory for one rank.

    Raises:
        UserError: on every rank, for the first host that is too small.
    """
    if not needed:
        return
    host = socket.gethostname()
    ranks = everyone([host], world).count(host)
    with shared_fate(world):
        room = memory_to_be_had()
        if world.local_rank == 0 and needed * ranks > room:
            raise UserError(
                f"{json_path}: offloading takes {needed / 1e9:.3g} GB of memory a rank, {needed * ranks / 1e9:.3g} GB "
                f"for the {ranks} rank(s) of {host}, and {room / 1e9:.3g} GB are free there; use more hosts, or a JSON "
                "without offload"
            )
