"""Offloading to the host's memory and to NVMe: what is refused before the start.

W ranks; n elements of a parameter, p = ⌈n / W⌉ its part on one rank.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from mirage_ds.engine.offload_bytes import STATES, Keys, files_of, memory_of, part, read_keys, swapped_groups
from mirage_ds.engine.setup import World, everyone
from mirage_ds.engine.swap_folders import clear
from mirage_ds.errors import UserError

# From this multiple of all elements on, stage3_max_reuse_distance keeps every gathered weight (scale.Zero3.keeps).
ALL_KEPT = 5
# Linux's number of the right to lock any amount of memory (CAP_IPC_LOCK).
IPC_LOCK = 14


class Disk(NamedTuple):
    """What one folder of NVMe is like on this host.

    Attributes:
        path: as the JSON names it.
        trouble: why it cannot be used, or None.
        device: of its file system.
        free: bytes.
    """

    path: Path
    trouble: str | None
    device: int
    free: int


class Host(NamedTuple):
    """What one host has to give.

    Attributes:
        name: of the host.
        ranks: that run on it.
        memory: bytes that its ranks can still have together.
        lockable: bytes that one process may lock, None where there is no limit.
        swapper: what is missing for DeepSpeed's async_io, or None.
        disks: each of the JSON's folders.
    """

    name: str
    ranks: int
    memory: int
    lockable: int | None
    swapper: str | None
    disks: list[Disk]


def faults(
    keys: Keys,
    json_path: Path,
    groups: Sequence[Sequence[int]],
    layer: Sequence[int],
    ranks: int,
    host: Host,
    checkpoints: bool,
) -> list[str]:
    """Say why a run cannot offload on this host as its JSON says; nothing where it can.

    Args:
        groups: elements of the parameters of each optimizer group.
        layer: elements of one decoder layer's matrices, in the order of its walk (scale.Sizes.matrices).
        ranks: W.
        checkpoints: the run is to save or to continue from sharded checkpoints.
    """
    if "nvme" in (keys.param, keys.optimizer):
        found = [
            *_wrong_keys(keys, json_path, groups, layer, ranks),
            *(_wrong_checkpoints(keys, json_path, groups, ranks) if checkpoints else ()),
            *_wrong_machine(keys, json_path, groups, ranks, host),
        ]
    else:
        found = []
    needed = memory_of(keys, groups, ranks)
    if needed.total * host.ranks > host.memory:
        found.append(
            f"{json_path}: offloading takes {_gb(needed.total)} of memory a rank at least, "
            f"{_gb(needed.total * host.ranks)} for the {host.ranks} rank(s) of {host.name}, and {_gb(host.memory)} are "
            "to be had there; use more hosts, offload to 'nvme', or lower sub_group_size and the buffers"
        )
    return found


def _wrong_keys(
    keys: Keys, json_path: Path, groups: Sequence[Sequence[int]], layer: Sequence[int], ranks: int
) -> Iterator[str]:
    zero = f"{json_path}: 'zero_optimization."
    if keys.stage != 3:
        yield (
            f"{zero}stage' is {keys.stage}, where DeepSpeed keeps in memory what should be on NVMe, without a word; "
            "write 3, or offload to 'cpu'"
        )
        return
    for block, device, path in (
        ("offload_param", keys.param, keys.param_path),
        ("offload_optimizer", keys.optimizer, keys.optimizer_path),
    ):
        if device == "nvme" and path is None:
            yield f"{zero}{block}' is on NVMe without a folder; add 'nvme_path', a folder on a local NVMe disk"
    if keys.param == "nvme":
        yield from _wrong_weight_buffers(keys, zero, [n for group in groups for n in group], layer, ranks)
    if keys.optimizer == "nvme":
        yield from _wrong_state_buffers(keys, zero, groups, ranks)


def _wrong_weight_buffers(
    keys: Keys, zero: str, elements: Sequence[int], layer: Sequence[int], ranks: int
) -> Iterator[str]:
    swapped = {n: part(n, ranks) for n in elements if keys.swaps(part(n, ranks), keys.weight)}
    if swapped and max(swapped.values()) > keys.buffer_size:
        yield (
            f"{zero}offload_param.buffer_size' is {keys.buffer_size} elements, and each of {ranks} rank(s) has "
            f"{max(swapped.values())} of the largest parameter; write {max(swapped.values())} or more"
        )
    kept = keys.reuse >= ALL_KEPT * sum(elements)
    needed = sum(n in swapped and n > keys.persistence for n in elements) if kept else _held(keys, layer, ranks) + 1
    if swapped and keys.buffers < needed:
        yield (
            f"{zero}offload_param.buffer_count' is {keys.buffers}, and at stage3_max_reuse_distance {keys.reuse} so "
            f"many weights stay gathered that each rank needs {needed}; write {needed} or more, or lower the distance"
        )
    # Below a max_live of one element nothing is gathered ahead, and then at most one weight read ahead.
    if swapped and keys.prefetch and keys.live:
        yield (
            f"{zero}stage3_prefetch_bucket_size' is {keys.prefetch}: DeepSpeed may then read a weight ahead twice, "
            "once for a layer's recomputation and once for its gradient, and die of it ('already assigned swap "
            "buffer'); write 0"
        )


def _held(keys: Keys, layer: Sequence[int], ranks: int) -> int:
    """Count the matrices of a layer that are gathered when its recomputation ends; each keeps its buffer as long.

    One stays where the way from it to the end of the layer and back is shorter than `reuse`; the last one always
    (scale.volume). The next weight needs one buffer more. Seen with 0.19.8: one buffer less stops the run.
    """
    return sum(
        keys.swaps(part(n, ranks), keys.weight)
        and n > keys.persistence
        and (i == len(layer) - 1 or 2 * sum(layer[i + 1 :]) < keys.reuse)
        for i, n in enumerate(layer)
    )


def _wrong_state_buffers(keys: Keys, zero: str, groups: Sequence[Sequence[int]], ranks: int) -> Iterator[str]:
    sizes = [sum(part(n, ranks) for n in one) for one in swapped_groups(keys, groups, ranks)]
    # The sub-group that is stepped, the next one being read, the last one being written.
    together = min(len(sizes), 1 + keys.ahead)
    needed = (STATES + 1) * together
    if keys.state_buffers < needed:
        yield (
            f"{zero}offload_optimizer.buffer_count' is {keys.state_buffers}, and AdamW needs {STATES} for its states "
            f"and one for the gradient, for {together} sub-group(s) at a time; write {needed} or more"
        )
    if keys.fast_init and keys.param == "nvme" and sizes and max(sizes) > keys.buffer_size:
        yield (
            f"{zero}offload_optimizer.fast_init' reads a sub-group of {max(sizes)} elements into a buffer of "
            f"offload_param.buffer_size {keys.buffer_size}; remove it, or lower sub_group_size"
        )


def _wrong_checkpoints(keys: Keys, json_path: Path, groups: Sequence[Sequence[int]], ranks: int) -> Iterator[str]:
    weights = sum(part(n, ranks) for group in groups for n in group)
    # Seen with 0.19.8: states on NVMe come back without AdamW's moments and step count, weights there not at all.
    if keys.optimizer == "nvme" or keys.max_in_cpu < weights:
        yield (
            f"{json_path}: DeepSpeed cannot restore a checkpoint of a run with weights or AdamW's states on NVMe; "
            "leave out --save_every and --resume auto, or offload to 'cpu'"
        )


def _wrong_machine(
    keys: Keys, json_path: Path, groups: Sequence[Sequence[int]], ranks: int, host: Host
) -> Iterator[str]:
    if host.swapper:
        yield f"{host.name}: {host.swapper}"
    for disk in host.disks:
        if disk.trouble:
            yield f"{json_path}: nvme_path {disk.path} on {host.name} {disk.trouble}"
    files = files_of(keys, groups, ranks)
    sound = [disk for disk in host.disks if disk.trouble is None]
    for device in {disk.device: None for disk in sound}:
        disks = [disk for disk in sound if disk.device == device]
        paths = [disk.path for disk in disks]
        own = files.weights * (keys.param_path in paths) + files.optimizer * (keys.optimizer_path in paths)
        if own * host.ranks > disks[0].free:
            yield (
                f"{json_path}: nvme_path {paths[0]} on {host.name} has {_gb(disks[0].free)} free, and the {host.ranks} "
                f"rank(s) there write {_gb(own * host.ranks)} (weights, AdamW's states, gradients); free some, name a "
                "larger disk, or use more hosts"
            )
    locked = memory_of(keys, groups, ranks).locked
    if host.lockable is not None and locked > host.lockable:
        yield (
            f"{host.name}: a process may lock {_gb(host.lockable)} of memory, and the buffers of {json_path} take "
            f"{_gb(locked)}; raise `ulimit -l` (memlock in limits.conf, or Slurm's PropagateResourceLimits), or lower "
            "buffer_count, buffer_size and sub_group_size"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------------ what this host has


def look(keys: Keys, ranks: int) -> Host:
    """Look at this host. Folders of NVMe are cleared of what ended runs have left in them.

    Args:
        ranks: of the job, on this host.
    """
    on_nvme = "nvme" in (keys.param, keys.optimizer)
    return Host(
        name=socket.gethostname(),
        ranks=ranks,
        memory=memory_to_be_had(),
        lockable=lockable_bytes() if on_nvme else None,
        swapper=missing_for_swapping() if on_nvme else None,
        disks=[look_at(path) for path in keys.paths],
    )


def memory_to_be_had(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory and swap that processes here can still have, a control group's limit included."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    limits = [cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"]
    stated = [file.read_text().strip() for file in limits if file.is_file()]
    return min([free, *(int(text) for text in stated if text != "max")])


def lockable_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Bytes that a process may lock in memory; None where it may lock any amount."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    rights = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("CapEff:")]
    if limit == resource.RLIM_INFINITY or any(int(text, 16) >> IPC_LOCK & 1 for text in rights):
        return None
    return limit


def missing_for_swapping() -> str | None:
    """Say what DeepSpeed's async_io, which reads and writes the files, lacks on this host."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import is_ninja_available

    if installed_ops.get(AsyncIOBuilder.NAME):
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler for DeepSpeed's async_io, which NVMe offload needs; `apt-get install g++` there"
    if not is_ninja_available():
        return "no ninja for DeepSpeed's async_io, which NVMe offload needs; `pip install ninja` there"
    # It links a program of one line against libaio.
    if not AsyncIOBuilder().is_compatible(verbose=False):
        return (
            "libaio or its headers are missing, which DeepSpeed's async_io needs for NVMe offload; `apt-get install "
            "libaio-dev` (libaio-devel where there is dnf) there, or set CFLAGS and LDFLAGS to where it is"
        )
    return None


def look_at(path: Path) -> Disk:
    """Look at one folder of NVMe, and clear it of what ended runs have left."""
    if not path.is_dir():
        # DeepSpeed would make it, on whatever disk is there while the NVMe disk is not mounted.
        return Disk(path, "is no folder; make it on the NVMe disk", -1, 0)
    try:
        clear(path)
        _write_directly(path)
    except OSError as error:
        return Disk(path, f"cannot be used ({_why(error)}); name a folder on a local disk that you may write", -1, 0)
    return Disk(path, None, path.stat().st_dev, shutil.disk_usage(path).free)


def _why(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "its file system takes no direct I/O, as tmpfs"
    return error.strerror or str(error)


def _write_directly(path: Path) -> None:
    """Open a file as async_io does."""
    with tempfile.TemporaryDirectory(prefix=".mirage_ds-", dir=path) as folder:
        os.close(os.open(Path(folder) / "try", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))


def check_offload(
    values: Mapping[str, Any],
    json_path: Path,
    groups: Sequence[Sequence[int]],
    layer: Sequence[int],
    world: World,
    checkpoints: bool,
) -> None:
    """Refuse a run that cannot offload as its resolved JSON says, before anything is loaded. All ranks call it.

    One rank of each host looks.

    Args:
        groups: elements of the parameters of each optimizer group, in their order (setup.weight_decay_groups).
        layer: elements of one decoder layer's matrices, in the order of its walk (scale.Sizes.matrices).
        checkpoints: the run is to save or to continue from sharded checkpoints.

    Raises:
        UserError: on every rank, the first fault of the first host that has one.
    """
    keys = read_keys(values)
    if keys.param == keys.optimizer == "none":
        return
    here = everyone([socket.gethostname()], world).count(socket.gethostname())
    own = []
    if world.local_rank == 0:
        own = faults(keys, json_path, groups, layer, world.size, look(keys, here), checkpoints)
    found = everyone(own, world)
    if found:
        raise UserError(found[0])
