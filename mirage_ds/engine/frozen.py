"""What training never changes and DeepSpeed's universal loader does not restore: noted in each checkpoint, compared.

The frozen tower, frozen parameters inside the engine, and buffers. A run that went on with others would train another
model without a word.
"""

import hashlib
import math
from typing import Any

import torch
from torch import nn

from mirage_ds.engine.setup import World, from_rank_zero
from mirage_ds.errors import UserError
from mirage_ds.model.gathered import gathered

# Name of a tensor → its SHA-256, or its values where it is computed anew in each process.
Notes = dict[str, str | list[float]]
# Another processor or library may compute the rotary frequencies with another last bit (1.2e-7 of a float32);
# another base or width changes them by far more.
RELATIVE = 1e-5


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a whole tensor: dtype, shape, bytes."""
    made = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


def notes_of_tower(tower: nn.Module | None, world: World) -> Notes:
    """Note each weight of the frozen tower, by the name it has in a model folder; nothing where there is none.

    Rank 0 reads them, every rank gets the notes.
    """
    weights = tower.state_dict() if tower is not None else {}
    return from_rank_zero(lambda: {f"visual.{name}": digest(weight) for name, weight in weights.items()}, world)


def notes_of_engine(model: nn.Module, world: World) -> Notes:
    """Note each frozen parameter and each buffer of the module that the engine sees. All ranks call it.

    Buffers that no checkpoint holds (non-persistent) are noted by value: they follow from the configuration.
    """
    notes: Notes = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with gathered([parameter]):
                notes[name] = digest(parameter) if world.rank == 0 else ""
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        by_value = name not in kept and buffer.is_floating_point()
        notes[name] = buffer.double().flatten().tolist() if by_value else digest(buffer)
    return from_rank_zero(lambda: notes, world)


def check_same(place: Any, noted: Notes, now: Notes) -> None:
    """Compare what a checkpoint notes with what this process has.

    Args:
        place: the checkpoint, for the message.

    Raises:
        UserError: names the first tensor that differs.
    """
    for name in sorted(noted.keys() | now.keys()):
        if name not in noted or name not in now:
            what = f"of {place} is missing here" if name in noted else f"is not in {place}"
        elif not _equal(noted[name], now[name]):
            what = f"is not that of {place} (dtype, shape or bytes)"
        else:
            continue
        raise UserError(
            f"--resume auto: the frozen tensor {name} {what}; go on with the same --model or --load_model_path, "
            "unchanged, or train into another --save_model_path"
        )


def _equal(one: str | list[float], other: str | list[float]) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=RELATIVE) for a, b in zip(one, other, strict=True))
