"""Offloading to the host's memory: a run that a host has no room for is refused before anything is loaded.

W ranks; n elements of a parameter, p = ⌈n / W⌉ its part on one rank; b bytes of a weight in the forward, s of a master
weight or moment, a of an accumulated gradient.
"""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from mirage_ds.engine.ds_config import compute_dtype, offload_device, zero_stage
from mirage_ds.engine.setup import World, everyone, shared_fate
from mirage_ds.errors import UserError


def host_bytes(values: dict[str, Any], elements: Sequence[int], ranks: int) -> int:
    """Bytes that offloading takes of the host's memory for one rank, at least.

    Parameters: b p. Optimizer: a p of accumulated gradients, 3 s p of master weights and moments, and under ZeRO-3 the
    gradient that it steps with, s p. So DeepSpeed 0.19.8 does it (runtime/zero/stage3.py). What is left out makes the
    sum too small, so that nothing is refused that could run.

    Args:
        values: the resolved JSON.
        elements: of each trained parameter.
    """
    own = sum(-(-n // ranks) for n in elements)
    weight = 2 if compute_dtype(values) == "bfloat16" else 4
    low = values.get("bf16", {}).get("bf16_master_weights_and_grads")
    state = 2 if weight == 2 and low else 4
    sums = (values.get("data_types") or {}).get("grad_accum_dtype")
    each = 0
    if offload_device(values, "param") != "none":
        each += weight
    if offload_device(values, "optimizer") != "none":
        each += {"fp32": 4, "bf16": 2, "fp16": 2}.get(str(sums), weight)
        each += (4 if zero_stage(values) == 3 else 3) * state
    return each * own


def memory_to_be_had(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory and swap that processes here can still have, a control group's limit included."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    limits = [cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"]
    stated = [file.read_text().strip() for file in limits if file.is_file()]
    return min([free, *(int(text) for text in stated if text != "max")])


def check_offload(values: dict[str, Any], json_path: Path, elements: Sequence[int], world: World) -> None:
    """Refuse a run that a host has no room for. All ranks call it; one rank of each host looks.

    Args:
        values: the resolved JSON.
        elements: of each trained parameter.

    Raises:
        UserError: on every rank, for the first host that is too small.
    """
    needed = host_bytes(values, elements, world.size)
    if not needed:
        return
    host = socket.gethostname()
    ranks = everyone([host], world).count(host)
    with shared_fate(world):
        room = memory_to_be_had()
        if world.local_rank == 0 and needed * ranks > room:
            raise UserError(
                f"{json_path}: offloading takes {_gb(needed)} of memory a rank at least, {_gb(needed * ranks)} for the "
                f"{ranks} rank(s) of {host}, and {_gb(room)} are free there; use more hosts, or a JSON without offload"
            )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
