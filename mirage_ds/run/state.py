"""What a checkpoint says of its run: what a resume compares (checkpoint.MUST_AGREE), and what an export needs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from mirage_ds.config.columns import parse_columns
from mirage_ds.config.rl import rl_noted
from mirage_ds.data.selection import content
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.adapter import note_of
from mirage_ds.engine.frozen import notes_of_tower
from mirage_ds.engine.manifest import entry_of
from mirage_ds.engine.setup import from_rank_zero
from mirage_ds.model.folder import weight_files
from mirage_ds.model.load import read_config
from mirage_ds.model.targets import describe_encoder
from mirage_ds.run.records import longest_block, usable_rows
from mirage_ds.run.settings import Checked, Run

if TYPE_CHECKING:
    from mirage_ds.run.setup import Data

# Settings in a checkpoint's state (state_of): under their own names, and two lists that are compared as a whole.
NOTED = {"stage", "latent_size", "seed", "train_vision", "reduction"}
LATENTS = ("slots", "compress_strategy", "latent_loss", "detach_latents", "train_targets")
OPTIMIZER = ("learning_rate", "lr_scheduler", "warmup_steps", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay")


def state_of(run: Run, checked: Checked, data: Data) -> dict[str, Any]:
    """Say what a checkpoint of this run says of it: checkpoint.MUST_AGREE, and what training never changes."""
    config = run.config
    return dict(
        **config.model_dump(include=NOTED),
        world_size=run.world.size,
        latents=[getattr(config, name) for name in LATENTS],
        data=content(data.index.rows.source, config.records, parse_columns(config.columns)),
        rows=usable_rows(data.index),
        rows_per_step=config.rows_per_step,
        lora=note_of(checked.lora),
        ce_weight=config.gamma,
        optimizer=[getattr(config, name) for name in OPTIMIZER],
        zero_stage=ds.zero_stage(checked.ds_values),
        tower=notes_of_tower(data.tower.tower if data.tower else None, run.world),
        # For `mirage-ds export`: where the rest of a model folder comes from.
        sources=[str(folder.resolve()) for folder in checked.folders],
        dtype=ds.compute_dtype(checked.ds_values),
        pixels=[config.min_pixels, config.max_pixels],
        **(rl_state(run, checked) if checked.policy else {}),
        **targets_state(run, checked, data),
        **({"longest": longest_block(config, data.index)} if config.compress_strategy == "region" else {}),
    )


def targets_state(run: Run, checked: Checked, data: Data) -> dict[str, Any]:
    """Say of learned targets what they are made for, or which are learnt from; nothing where there are none."""
    config = run.config
    if config.stage == "scaffold":
        sources = [str(folder.resolve()) for folder in checked.folders]
        tower = data.tower.tower if data.tower and not config.train_vision else None
        made = partial(describe_encoder, read_config(checked.folders[0]), config.latent_size, tower, sources)
        return {"scaffold": from_rank_zero(made, run.world)}
    own: dict[str, Any] = {"feed": "own"} if config.feed == "own" else {}
    own |= {"latent_passes": config.latent_passes} if config.latent_passes is not None else {}
    own |= {"bottleneck": True} if config.bottleneck else {}
    return own | ({"latent_targets": data.targets.digest} if data.targets else {})


def rl_state(run: Run, checked: Checked) -> dict[str, Any]:
    """Say what decides a run of rl besides: settings, what scores, and with a KL the start that it leads back to."""
    config, start = run.config, checked.folders[0]
    noted: dict[str, Any] = dict(latent_policy=checked.policy, rl=rl_noted(config), task=config.task)
    if config.beta:
        # By content: a folder may be moved, or be written over.
        noted["reference"] = from_rank_zero(
            lambda: [entry_of(start, file).sha256 for file in weight_files(start)], run.world
        )
    return noted
