"""Sharded checkpoints: every rank writes its part, `latest` is written last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

STATE_FILE = "mirage_state.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save_checkpoint(engine: Any, folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Save the engine's whole state after `step` optimizer steps. All ranks call it.

    Args:
        folder: the run's checkpoint folder.
        state: what a resume needs to know before it loads: world size, stage, k, data position.

    Returns:
        The checkpoint's folder.
    """
    tag = f"global_step{step}"
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(folder / tag / STATE_FILE, json.dumps(state, indent=1) + "\n")
        write_atomically(folder / "latest", tag)
    dist.barrier()
    return folder / tag
