"""A folder below nvme_path for each run's swapped files: no two runs mix, and what ended runs have left is removed."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from mirage_ds.engine.offload_bytes import read_keys
from mirage_ds.engine.setup import World, from_rank_zero

# A run's own folder below nvme_path, and the file in it that each of its ranks holds locked while it lives.
FOLDER, LOCK_FILE = "mirage_ds-", "lock"
# In nvme_path itself, one a user, held by whoever makes or removes such folders.
GATE_FILE = ".mirage_ds-{}.lock"


class Swap:
    """This rank's hold on its run's folders below nvme_path; `release`, or the end of a `with`, gives them up.

    A rank holds a shared lock on a file in each. The kernel drops it when the process ends, however it ends, and locks
    are seen from other containers and, where the disk is shared, from other hosts: a process id would mean nothing
    there, and may have been given anew.

    Args:
        folders: made where they are not there yet.
    """

    def __init__(self, folders: Sequence[Path]):
        self._held: list[tuple[Path, int]] = []
        for folder in folders:
            with _gate(folder.parent):
                folder.mkdir(exist_ok=True)
                lock = _open_lock(folder)
                fcntl.flock(lock, fcntl.LOCK_SH)
            self._held.append((folder, lock))

    def __enter__(self) -> Self:
        """Hold on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give up."""
        self.release()

    def release(self) -> None:
        """Give the folders up. The last rank that does so removes them; a second call does nothing."""
        for folder, lock in self._held:
            with _gate(folder.parent):
                if _only_we_hold(lock):
                    shutil.rmtree(folder)
            os.close(lock)
        self._held = []


def _open_lock(folder: Path) -> int:
    return os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)


def _only_we_hold(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _gate(path: Path) -> Iterator[None]:
    """Keep others from making and removing folders below `path`: a new one is unlocked for a moment."""
    gate = os.open(path / GATE_FILE.format(os.getuid()), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield
    finally:
        os.close(gate)


def clear(path: Path) -> list[Path]:
    """Remove the folders of this user's runs that have ended below `path`; return them. Those of living runs stay."""
    gone = []
    with _gate(path):
        for folder in sorted(path.glob(f"{FOLDER}*")):
            if folder.stat().st_uid != os.getuid():
                continue
            lock = _open_lock(folder)
            try:
                if _only_we_hold(lock):
                    shutil.rmtree(folder)
                    gone.append(folder)
            finally:
                os.close(lock)
    return gone


def in_folders(values: Mapping[str, Any], token: str) -> dict[str, Any]:
    """Return a resolved JSON whose nvme_paths are the run's own folders."""
    changed = deepcopy(dict(values))
    for name in ("offload_param", "offload_optimizer"):
        block = changed.get("zero_optimization", {}).get(name) or {}
        if block.get("device") == "nvme":
            block["nvme_path"] = str(Path(block["nvme_path"]) / f"{FOLDER}{token}")
    return changed


def claim_folders(values: Mapping[str, Any], world: World) -> tuple[dict[str, Any], Swap]:
    """Give the run a folder of its own below each nvme_path of a resolved JSON. All ranks call it.

    Two runs on one disk would write the same names otherwise.

    Returns:
        The JSON with these folders, for the model and the engine; and this rank's hold on them, to be released at the
        end.
    """
    keys = read_keys(values)
    if not keys.paths:
        return dict(values), Swap([])
    token = from_rank_zero(lambda: secrets.token_hex(4), world)
    swap = Swap([path / f"{FOLDER}{token}" for path in keys.paths])
    # Until all hold them: one that ended early would remove them before the others have come.
    world.waiting.meet()
    dist.barrier()
    return in_folders(values, token), swap
