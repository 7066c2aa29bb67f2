"""Writing safetensors shards and their index."""

import errno
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mirage_ds.files import is_own_weights, write_atomically
from mirage_ds.model.family import Family

SHARD_BYTES = 4 << 30


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file; OSError, and no file, where it cannot be."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # It keeps the system's number in its text alone.
        file.unlink(missing_ok=True)
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(file)) from None
    # safetensors makes files that only their owner reads; a model folder is shared like any other output.
    file.chmod(0o644)


class ShardWriter:
    """Writes tensors into safetensors shards of bounded size under temporary names, and names them at the end.

    Args:
        family: whose checkpoints' names the tensors get.
    """

    def __init__(self, folder: Path, family: Family, shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.family = family
        self.shards: list[list[str]] = []
        self.waiting: dict[str, torch.Tensor] = {}
        self.total = 0

    def _partial(self, number: int) -> Path:
        return self.folder / f".model-{number:05d}.safetensors.partial"

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; a full shard is written at once. OSError where it cannot be."""
        size = tensor.numel() * tensor.element_size()
        if self.waiting and sum(t.numel() * t.element_size() for t in self.waiting.values()) + size > self.shard_bytes:
            self._flush()
        self.waiting[self.family.written_name(name)] = tensor.contiguous()
        self.total += size

    def _flush(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.waiting, self._partial(len(self.shards)))
        self.shards.append(list(self.waiting))
        self.waiting = {}

    def finish(self) -> None:
        """Put the shards and their index in place, and remove those of an earlier save."""
        if self.waiting:
            self._flush()
        for old in self.folder.iterdir():
            if is_own_weights(old.name):
                old.unlink()
        for left in set(self.folder.glob(".model-*.partial")) - {self._partial(n) for n in range(len(self.shards))}:
            left.unlink()
        if len(self.shards) == 1:
            self._partial(0).replace(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            file = f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            self._partial(number).replace(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        write_atomically(self.folder / "model.safetensors.index.json", json.dumps(index, indent=1))
