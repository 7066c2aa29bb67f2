"""Learned targets on disk and in stage 1: the folder that --stage scaffold saves, and its encoder, frozen.

F merged features of a helper, k latents a helper, L latents of a batch, H hidden, W numbers of a feature.

    <folder>/latent_targets.safetensors   the encoder's weights; with --train_vision its tower's, as `visual.*`
    <folder>/latent_targets.json          k, width, heads, whose latents they are; written last
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from mirage_ds.data.batch import Batch
from mirage_ds.errors import UserError
from mirage_ds.files import TARGETS, TARGETS_NOTE, delete_model, write_atomically
from mirage_ds.model.folder import TARGETS_FORMAT, header_of, read_targets
from mirage_ds.model.gathered import gathered
from mirage_ds.model.shards import write_tensors
from mirage_ds.model.target_encoder import EncoderSize, TargetEncoder, size_of
from mirage_ds.model.vision import FrozenTower


class Targets(NamedTuple):
    """A trained encoder, frozen.

    Attributes:
        tower: what it reads: its own, or the model's frozen one.
        digest: SHA-256 of its folder's files.
    """

    encoder: TargetEncoder
    tower: FrozenTower
    digest: str

    @torch.no_grad()
    def of(self, features: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Return the latents (k, H) of one helper, features (F, W), grid (3,): alone, so no bit depends on others."""
        device = self.encoder.queries.device
        return self.encoder(features.to(device), grid[None])

    def attach(self, batch: Batch) -> Batch:
        """Give the batch its targets, where its helpers came as pixels: each is the mean of itself alone."""
        if batch.helper_features is not None:
            return batch
        grids = batch.helper_grid_thw
        features = self.tower.features(batch.helper_pixel_values, grids)
        sizes = (grids.prod(-1) // self.encoder.size.merge**2).tolist()
        made = [self.of(own, grid) for own, grid in zip(features.split(sizes), grids, strict=True)]
        latents = torch.cat([features.new_empty(0, self.encoder.size.width), *made])
        each = torch.arange(len(latents), device=batch.pool_size.device)
        return batch._replace(
            helper_features=latents,
            helper_pixel_values=batch.helper_pixel_values.new_empty(0),
            pool_from=each,
            pool_to=each,
            pool_size=torch.ones_like(batch.pool_size),
        )


def tower_hash(tower: nn.Module) -> str:
    """SHA-256 of a tower's weights in bf16, so that it is the same however they are loaded."""
    made = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        made.update(name.encode())
        made.update(tensor.cpu().bfloat16().contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()


def describe_encoder(config: Any, k: int, tower: nn.Module | None, sources: list[str]) -> dict[str, Any]:
    """Return what latent_targets.json says.

    Args:
        config: of the language model (transformers' own); sources: its folders.
        tower: the frozen one that the encoder reads, None where it has its own.
    """
    made = dict(format=TARGETS_FORMAT, model_type=config.model_type, **size_of(config, k)._asdict())
    return {**made, "tower": tower and tower_hash(tower), "sources": sources}


def whole_tensors(encoder: TargetEncoder, keep: bool) -> dict[str, torch.Tensor]:
    """Return an encoder's weights, whole. All ranks call it.

    Args:
        keep: False returns nothing, for ranks that only take part.
    """
    found = {}
    for name, parameter in encoder.named_parameters():
        # One at a time.
        with gathered([parameter]):
            if keep:
                found[name] = parameter.detach().cpu().clone()
    return found


def write_encoder(tensors: Mapping[str, torch.Tensor], folder: Path, note: Mapping[str, Any]) -> None:
    """Write an encoder's folder, whole or not at all; a model that an earlier run left there is deleted.

    Args:
        note: what describe_encoder returns, and what else is worth knowing.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{TARGETS}.partial"
    write_tensors({name: one.contiguous() for name, one in tensors.items()}, partial)
    if (folder / "config.json").exists():
        delete_model(folder)
    (folder / TARGETS_NOTE).unlink(missing_ok=True)
    partial.replace(folder / TARGETS)
    write_atomically(folder / TARGETS_NOTE, json.dumps(dict(note), indent=2) + "\n")


def check_targets(folder: Path, config: Any, k: int) -> None:
    """Refuse learned targets that are not for a model.

    Args:
        config: the model's (transformers' own); k: --latent_size.

    Raises:
        UserError: they are of another size or family, or the folder is not whole.
    """
    note, size = read_targets(folder), size_of(config, k)
    given = EncoderSize(*(note[name] for name in EncoderSize._fields))
    what = f"--latent_targets {folder}"
    if given.k != k:
        how = f"give targets that were learnt with {k}"
        raise UserError(f"{what}: makes {given.k} latents a helper, and a block has {k} here; {how}")
    if note["model_type"] != config.model_type or given != size:
        was, now = (
            f"{kind} of width {one.width}" for kind, one in ((note["model_type"], given), (config.model_type, size))
        )
        raise UserError(f"{what}: made for a {was}, and this model is a {now}; give targets of this model")
    header = header_of(folder / TARGETS)
    with torch.device("meta"):
        wanted = {name: tuple(one.shape) for name, one in TargetEncoder(size).state_dict().items()}
    own = {name: one.shape for name, one in header.items() if not name.startswith("visual.")}
    if own != wanted or (len(own) == len(header)) != bool(note["tower"]):
        raise UserError(f"{what}: {TARGETS} does not hold what {TARGETS_NOTE} says; copy both again")


def load_targets(folder: Path, config: Any, k: int, tower: FrozenTower) -> Targets:
    """Load learned targets beside a frozen tower, on its device and in its dtype.

    Args:
        config, k: as check_targets, which this begins with.

    Raises:
        UserError: see check_targets; or they read a tower that has other weights.
    """
    check_targets(folder, config, k)
    note, weights = read_targets(folder), load_file(folder / TARGETS)
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    with (folder / TARGETS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    if note["tower"] and note["tower"] != tower_hash(tower.tower):
        raise UserError(
            f"--latent_targets {folder}: reads the vision tower of {note['sources'][0]}, and this model's has other "
            "weights; start from a model whose tower is the same, or train targets for this one"
        )
    own = {name.removeprefix("visual."): weights.pop(name) for name in list(weights) if name.startswith("visual.")}
    if own:
        tower = FrozenTower(copy.deepcopy(tower.tower))
        tower.tower.load_state_dict(own)
    encoder = TargetEncoder(size_of(config, k), None, tower.tower.device, tower.tower.dtype)
    encoder.load_state_dict(weights)
    return Targets(encoder.requires_grad_(False).eval(), tower, digest.hexdigest())
