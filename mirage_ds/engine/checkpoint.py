"""Sharded checkpoints: every rank writes its part, `latest` is written last.

checkpoints/global_step<N>/     DeepSpeed's shards and mirage_state.json
checkpoints/latest              the newest whole one
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mirage_ds.errors import UserError

STATE_FILE = "mirage_state.json"
# What must be the same for a run to go on exactly; name in the state → how a person says it.
MUST_AGREE = {
    "world_size": "number of ranks",
    "stage": "--stage",
    "latent_size": "--latent_size",
    "data": "content of --data_path (SHA-256)",
    "rows": "number of usable rows (--max_length, --max_pixels)",
    "rows_per_step": "--global_batch_size",
    "seed": "--seed",
    "reduction": "--reduction",
    "ce_weight": "--ce_weight",
    "optimizer": "AdamW and its schedule (--learning_rate, --lr_scheduler, --warmup_steps, β, ε, --weight_decay)",
    "train_vision": "--train_vision",
    "zero_stage": "ZeRO stage of --deepspeed",
}


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save_checkpoint(engine: Any, folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Save the engine's whole state. All ranks call it.

    Args:
        folder: the run's checkpoint folder.
        state: what a resume checks before it loads (MUST_AGREE), and "step", the optimizer steps taken.
        keep: newest checkpoints that stay; older ones are deleted once `latest` names this one.

    Returns:
        The checkpoint's folder.
    """
    tag = f"global_step{state['step']}"
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(folder / tag / STATE_FILE, json.dumps(state, indent=1) + "\n")
        write_atomically(folder / "latest", tag)
        # Later ones are there where a run went on from an older checkpoint; it will overwrite them.
        until_now = [path for path in whole_checkpoints(folder) if _step_of(path) <= state["step"]]
        for old in until_now[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder / tag


def whole_checkpoints(folder: Path) -> list[Path]:
    """List the finished checkpoints of a run, oldest first."""
    found = [path.parent for path in folder.glob(f"global_step*/{STATE_FILE}")]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("global_step"))


def find_checkpoint(folder: Path, wanted: dict[str, Any]) -> Path | None:
    """Return the checkpoint that `latest` names, None where the run has none yet.

    Args:
        wanted: this run's values of MUST_AGREE.

    Raises:
        UserError: the checkpoint was made by another run; one sentence with both values.
    """
    if not (folder / "latest").is_file():
        return None
    found = folder / (folder / "latest").read_text().strip()
    if not (found / STATE_FILE).is_file():
        raise UserError(f"{folder}/latest names {found.name}, which is not there or not whole; correct that file")
    state = json.loads((found / STATE_FILE).read_text())
    for name, said in MUST_AGREE.items():
        if state.get(name) != wanted[name]:
            raise UserError(
                f"--resume auto: {found} was written with {said} {state.get(name)}, this run has {wanted[name]}; go on "
                "with the same, or train into another --save_model_path"
            )
    return found


def load_checkpoint(engine: Any, found: Path) -> int:
    """Load weights, optimizer and schedule; return the optimizer steps taken. All ranks call it."""
    place, state = engine.load_checkpoint(str(found.parent), tag=found.name)
    if place is None:
        raise UserError(f"{found}: DeepSpeed could not load it; name an older one in {found.parent}/latest")
    return int(state["step"])
