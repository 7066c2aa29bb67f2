"""A run, and the check of its settings: what can be refused before a look at the records."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirage_ds.config.extras import need_for
from mirage_ds.config.rl import LatentPolicy
from mirage_ds.config.run import RunConfig
from mirage_ds.data.encode import LATENT_TOKENS, Encoder
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.offload import check_offload
from mirage_ds.engine.setup import World, agree, check_ds_config, from_rank_zero, shared_fate, try_engine
from mirage_ds.engine.spelling import read_trained
from mirage_ds.engine.versions import check_release, gather_safely
from mirage_ds.errors import UserError
from mirage_ds.model.attention import choose_backend, head_width_of
from mirage_ds.model.kernels import check_device
from mirage_ds.model.load import check_folder, read_config, shape_of
from mirage_ds.model.lora import Lora, find_targets, trained_shapes
from mirage_ds.model.shape import Shape
from mirage_ds.model.target_encoder import TargetEncoder, size_of
from mirage_ds.model.targets import check_targets
from mirage_ds.plan.settings import two_layers
from mirage_ds.plan.shape import sizes, trained_parameters
from mirage_ds.run.beforehand import check_outputs, check_rows, check_sockets
from mirage_ds.run.journal import Journal
from mirage_ds.run.records import make_encoder, model_folders
from mirage_ds.run.stop import StopRequest


@dataclass(frozen=True)
class Run:
    """A training run as one rank sees it.

    Attributes:
        asked: whether somebody wants this process to stop.
    """

    config: RunConfig
    world: World
    journal: Journal = field(default_factory=Journal)
    asked: Callable[[], bool] = field(default_factory=lambda: StopRequest().asked)

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.config.save_model_path / "run"

    def stops(self) -> bool:
        """Tell, on every rank alike, whether any of them was asked to stop."""
        return agree(self.asked(), self.world)


class Checked(NamedTuple):
    """Settings that this machine and the model allow.

    Attributes:
        ds_values: the DeepSpeed JSON, resolved.
        folders: of the model: the first gives the weights, each gives what those before it lack.
        encoder: of the records to train on.
        lora: None where all weights are trained.
        policy: what a latent is to it, in rl; None in the other stages.
    """

    ds_values: dict[str, Any]
    folders: list[Path]
    encoder: Encoder
    shape: Shape
    lora: Lora | None
    policy: LatentPolicy | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the forward."""
        return getattr(torch, ds.compute_dtype(self.ds_values))

    @property
    def products(self) -> torch.dtype:
        """In which matrices are multiplied."""
        return torch.bfloat16 if ds.products_in_bf16(self.ds_values) else torch.float32


def check_settings(run: Run) -> Checked:
    """Refuse what can be refused without a look at the records."""
    config, world = run.config, run.world
    run.journal.phase("records")
    from_rank_zero(partial(need_for, config), world)
    check_rows(config, world.size)
    from_rank_zero(partial(check_outputs, config), world)
    with shared_fate(world):
        # Each host has a TMPDIR of its own.
        check_sockets(config)
    json_path = config.deepspeed or ds.default_path("stage2" if config.recurrent else config.stage)
    ds_values = read_ds_values(config, json_path, world)
    folders = from_rank_zero(partial(model_folders, config, partial(run.journal.phase, "records")), world)
    with shared_fate(world):
        # Once a host: where the hosts have copies of their own, each has to be whole.
        if world.local_rank == 0:
            check_folder(folders[0], folders[1:])
    model_config = read_config(folders[0])
    shape = shape_of(model_config, f"{folders[0]}/config.json")
    ds.fill_limits(ds_values, two_layers(sizes(shape)))
    if config.latent_targets:
        with shared_fate(world):
            check_targets(config.latent_targets, model_config, config.latent_size)
    encoder = make_encoder(config, folders)
    trained = read_trained(model_config)
    if config.recurrent and trained.get("compress_strategy") == "region":
        how = f"--stage {config.stage} feeds back k latents a block; start from a model of another strategy"
        raise UserError(f"{folders[0]} was trained with --compress_strategy region, and {how}")
    policy = find_policy(config, trained, folders[0]) if config.stage == "rl" else None
    if config.latent_passes is not None:
        check_together(config, trained, folders[0])
    lora = from_rank_zero(lambda: make_lora(config, shape, encoder), world)
    checked = Checked(ds_values, folders, encoder, shape, lora, policy)
    head_width = head_width_of(model_config.get_text_config())
    choose_backend(config.attention, world.device, checked.products, head_width)
    check_device(config.kernels, world.device)
    elements = trained_elements(shape, config.trains_tower, lora)
    if config.stage == "scaffold":
        elements = encoder_elements(model_config, shape, config)
    check_offload(ds_values, json_path, elements, world)
    if config.deepspeed:
        # The shipped ones are known to start.
        try_engine(ds_values, json_path)
    return checked


def find_policy(config: RunConfig, trained: Mapping[str, Any], folder: Path) -> LatentPolicy:
    """Choose --latent_policy by how the model was trained, where it is not given.

    Args:
        trained: what the model's folder says of its training (spelling.read_trained).

    Raises:
        UserError: the model knows no latents, or others.
    """
    stage, slots, k = (trained.get(name) for name in ("stage", "slots", "latent_size"))
    if slots not in (None, "latents"):
        raise UserError(
            f"{folder} was trained with --slots {slots}: --stage rl takes a model whose answers see latents, or one "
            "that was trained without any"
        )
    if "latent_passes" in trained:
        raise UserError(
            f"{folder} was trained with --latent_passes: --stage rl makes latents in turn; train stage2 without it"
        )
    if trained.get("bottleneck"):
        raise UserError(
            f"{folder} was trained with --bottleneck, and answers of --stage rl see the pictures: train it in stage2 "
            "without the flag first"
        )
    knows = stage not in (None, "sft")
    # A model whose answers were last trained as text may still have heads.
    usual: LatentPolicy = "text" if not knows else "gaussian" if "latent_heads" in trained else "through"
    policy = config.latent_policy or usual
    if policy != "text" and not knows:
        raise UserError(
            f"--latent_policy {policy}: {folder} was trained without latents; train it in stage1 and stage2 first, or "
            "leave the flag out"
        )
    if policy != "text" and k != config.latent_size:
        raise UserError(f"--latent_size {config.latent_size}: {folder} was trained with {k} latents a block; give {k}")
    return policy


def check_together(config: RunConfig, trained: Mapping[str, Any], folder: Path) -> None:
    """Refuse a start whose latents cannot be made together; `trained` as in find_policy.

    Raises:
        UserError: latents are drawn, or its slots are more or fewer.
    """
    given, k = f"--latent_passes {config.latent_passes}: {folder}", trained.get("latent_size")
    if "latent_heads" in trained:
        raise UserError(f"{given} has heads that draw latents in turn; start from what rl began with")
    if "latent_passes" in trained and k != config.latent_size:
        raise UserError(f"{given} has learned inputs of {k} slots; give --latent_size {k}")


def read_ds_values(config: RunConfig, json_path: Path, world: World) -> dict[str, Any]:
    """Resolve the DeepSpeed JSON and refuse what the installed releases cannot do with it."""
    values = ds.resolve(ds.read_json(json_path, world.device.type), json_path, config, world.size)
    check_release(values, json_path, bool(config.lora_rank) and config.gradient_checkpointing)
    gather_safely(values, world.device.type)
    check_ds_config(values, json_path)
    return values


def make_lora(config: RunConfig, model: Shape, encoder: Encoder) -> Lora | None:
    """Describe a run's adapters; None where all weights are trained.

    Raises:
        UserError: a layer that the decoder does not have.
    """
    if config.lora_rank is None:
        return None
    targets = find_targets(model.shapes, config.lora_targets)
    tokens = tuple(encoder.id_of(token) for token in LATENT_TOKENS)
    return Lora(config.lora_rank, config.lora_alpha or 2 * config.lora_rank, targets, tokens, config.seed)


def encoder_elements(model_config: Any, model: Shape, config: RunConfig) -> list[int]:
    """List the elements of each parameter that --stage scaffold trains."""
    with torch.device("meta"):
        own = [one.numel() for one in TargetEncoder(size_of(model_config, config.latent_size)).parameters()]
    return own + (model.elements("visual.") if config.train_vision else [])


def trained_elements(model: Shape, train_vision: bool, lora: Lora | None) -> list[int]:
    """List the elements of each trained parameter."""
    if lora:
        return [math.prod(shape) for shape in trained_shapes(model.shapes, lora)]
    return [elements for group in trained_parameters(model, train_vision) for elements in group]
