"""Loading: public-format checkpoints, old and new naming, into a MirageModel and a frozen tower.

H hidden, V vocabulary rows.

Older families' folders hold `visual.*`, `model.*`, `lm_head.weight` (flat names), newer ones and what transformers 5
saves `model.visual.*` and `model.language_model.*`. Both are read; each family's own is written (Family.written_name).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mirage_ds.config.run import Feed, LatentLoss, Stage
from mirage_ds.errors import UserError, reason
from mirage_ds.model.attention import INTERFACE_NAME, SEGMENTS_NAME, choose_backend, head_width_of, register
from mirage_ds.model.chunks import chunk_budget
from mirage_ds.model.family import FAMILIES, Family, check_kind, family_of, flat_name
from mirage_ds.model.folder import read_json
from mirage_ds.model.folder_check import check_processor, check_stored
from mirage_ds.model.forward import Forward, MirageModel
from mirage_ds.model.gathered import gathered
from mirage_ds.model.kernels import check_device
from mirage_ds.model.latent_heads import load_heads
from mirage_ds.model.lora import Lora, TokenRows, add_adapters
from mirage_ds.model.loss import LossHead
from mirage_ds.model.shape import Shape
from mirage_ds.model.target_encoder import TargetEncoder, size_of
from mirage_ds.model.vision import FrozenTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Loaded:
    """A model ready for the engine.

    Attributes:
        model: the trainable module.
        tower: the frozen tower, or None where the tower is trained inside `model`.
        config: the checkpoint's configuration, of one of family.FAMILIES.
    """

    model: MirageModel
    tower: FrozenTower | None
    config: PretrainedConfig


def public_name(name: str) -> str:
    """Translate a parameter's name, of a checkpoint or of a MirageModel, to the flat one."""
    # What has an adapter around it is still the layer's own weight.
    return "lm_head.weight" if name == "head.weight" else flat_name(name).replace(".base_layer.", ".")


@contextmanager
def _described(family: Family, where: str) -> Iterator[None]:
    """Say in a sentence that transformers makes nothing of a configuration."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # a wrong type or an impossible size leads transformers to almost any
        raise UserError(f"{where}: no {family.title} ({reason(error)}); copy the model's own config.json") from None


def read_config(folder: Path) -> PretrainedConfig:
    """Read a folder's configuration; UserError when it is of no known family."""
    from transformers import AutoConfig

    values = read_json(folder / "config.json")
    family = check_kind(values, folder / "config.json")
    with _described(family, f"{folder}/config.json"):
        config = AutoConfig.from_pretrained(folder)
    if config.dtype is None:
        # Published Qwen3-VL says it there alone.
        config.dtype = config.get_text_config().dtype
    return config


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names (public form) and shapes of the parameters that `config` describes."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type].model_class()(config)
    return {public_name(name): tuple(p.shape) for name, p in model.named_parameters()}


def shape_of(config: PretrainedConfig, where: str) -> Shape:
    """Describe the model of a configuration: the one place that counts parameters.

    Args:
        where: how its config.json is called in the message.

    Raises:
        UserError: transformers makes no model of it.
    """
    with _described(FAMILIES[config.model_type], where):
        return Shape(json.loads(config.to_json_string(use_diff=False)), expected_shapes(config))


def described(values: dict[str, Any], where: str) -> Shape:
    """Return the Shape of a configuration.

    Args:
        values: what a config.json holds; where: how it is called in messages.

    Raises:
        UserError: transformers makes no model of it.
    """
    family = family_of(values.get("model_type"), where)
    with _described(family, where):
        config = family.config_class().from_dict(copy.deepcopy(values))
    # As it is read back from a cache: with lists for tuples.
    return Shape(*json.loads(json.dumps(shape_of(config, where))))


def check_folder(folder: Path, processors: Sequence[Path] = ()) -> PretrainedConfig:
    """Refuse a folder that contradicts itself, before anything is loaded: whoever opens a model calls this first.

    Args:
        processors: folders that give the image processor where `folder` has none.

    Returns:
        Its configuration.

    Raises:
        UserError: its weights are not exactly those that config.json describes, or the processor is of another family.
    """
    config = read_config(folder)
    check_stored(folder, config, shape_of(config, f"{folder}/config.json").shapes)
    check_processor(config, (folder, *processors))
    return config


def check_vocabulary(config: PretrainedConfig, ids: dict[str, int]) -> None:
    """Check that the tokenizer's special tokens fit the model.

    Public checkpoints have more embedding rows than tokens (152,064 or 151,936 for 151,665), so the latent tokens need
    no resize; the public Mirage code's own have 151,668.

    Args:
        ids: token → id of `<|image_pad|>` and the latent tokens.
    """
    rows = config.get_text_config().vocab_size
    beyond = [token for token, number in ids.items() if number >= rows]
    if beyond:
        raise UserError(
            f"the embedding has {rows} rows and {', '.join(beyond)} would be number {max(ids.values())}: there is no "
            "room for the latent tokens; give a checkpoint with at least that many rows"
        )
    if ids["<|image_pad|>"] != config.image_token_id:
        raise UserError(
            f"config.json's image_token_id is {config.image_token_id}, the tokenizer's <|image_pad|> is "
            f"{ids['<|image_pad|>']}: model and tokenizer do not belong together"
        )


def open_weights(kind: Any, folder: Path, **options: Any) -> Any:
    """Load a checked folder (check_folder) with a class's own from_pretrained: without bars or reports on every rank.

    Args:
        kind: a transformers class; options: of from_pretrained.

    Raises:
        UserError: transformers made up a tensor, whatever the check has said.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, told = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    if told["missing_keys"]:
        raise UserError(
            f"{folder}: transformers {transformers.__version__} does not find {min(told['missing_keys'])}; copy or "
            "download the model again"
        )
    return model


def attend_in_segments(tower: Any, attention: str, device: torch.device) -> None:
    """Let a tower attend to all windows or images of a call at once.

    Not by set_attn_implementation or at the load: for a name with "flash" those look for a package.

    Args:
        attention: as choose_backend's; what no kernel takes, SDPA does.
    """
    register()
    tower.config._attn_implementation = SEGMENTS_NAME + choose_backend(attention, device, torch.bfloat16, 8)


def load_tower(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, attention: str = "auto"
) -> FrozenTower:
    """Load the vision tower alone. Call it while no HfDeepSpeedConfig is alive, or ZeRO-3 partitions it."""
    vision_config: Any = config.vision_config
    vision_config._attn_implementation = "sdpa"
    kind = FAMILIES[config.model_type].tower_class()
    names = {r"^(model\.)?visual\.": ""}
    tower = open_weights(kind, folder, config=vision_config, dtype=dtype, key_mapping=names)
    attend_in_segments(tower, attention, device)
    return FrozenTower(tower.to(device))


class Scaffold(NamedTuple):
    """An encoder that is to be trained.

    Attributes:
        k: latents; seed: of its start.
    """

    k: int
    seed: int


def new_encoder(whole: Any, config: Any, wanted: Scaffold, visual: Any, device: torch.device) -> TargetEncoder:
    """Make the encoder of --stage scaffold, and freeze the model around it.

    Args:
        whole: transformers' whole model, perhaps sharded; config: its configuration.
        visual: its tower, which is loaded once more for the model's own images: the copy that is trained, if any is.
    """
    whole.requires_grad_(False)
    if visual is not None:
        visual.requires_grad_(True)
    norm = whole.model.language_model.norm.weight
    encoder = TargetEncoder(size_of(config, wanted.k), visual, device, whole.lm_head.weight.dtype)
    with gathered([norm]):
        encoder.start(norm.detach().to("cpu"), wanted.seed)
    return encoder


def _adapted(whole: Any, lora: Lora, budget: int, device: torch.device) -> tuple[TokenRows, LossHead]:
    """Freeze a whole model and put adapters on it; return what is trained of its embedding, and the head."""
    whole.requires_grad_(False)
    add_adapters(whole.model.language_model, lora)
    matrix, embedding = whole.lm_head.weight, whole.model.language_model.embed_tokens.weight
    rows = TokenRows(embedding, lora.tokens, device)
    # Where embedding and head are one matrix, its rows are too.
    own = rows if matrix is embedding else TokenRows(matrix, lora.tokens, device)
    return rows, LossHead(matrix, budget, own.weight, own.ids)


def load_model(
    folder: Path,
    *,
    stage: Stage,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "auto",
    products: torch.dtype | None = None,
    checkpointing: bool = True,
    train_vision: bool = False,
    reduction: str = "sample",
    loss_chunk_bytes: int | None = None,
    tower: FrozenTower | None = None,
    ds_config: dict[str, Any] | None = None,
    latent_loss: LatentLoss = "cosine",
    detach_latents: bool = False,
    train_targets: bool = False,
    split: bool = False,
    kernels: str | None = None,
    lora: Lora | None = None,
    latent_heads: bool = False,
    feed: Feed = "targets",
    scaffold: Scaffold | None = None,
) -> Loaded:
    """Load a checkpoint folder.

    Args:
        dtype: of the weights in the forward.
        products: dtype of the products, where it is another (torch_autocast).
        loss_chunk_bytes: as LossHead takes them; by the device if None.
        tower: the frozen tower where it has been loaded already.
        ds_config: the resolved DeepSpeed configuration. Under ZeRO-3 the weights are then partitioned as they are
            read, so that no rank ever holds the whole model; None loads an ordinary module.
        latent_loss, detach_latents, train_targets, split, kernels: see forward.Forward.
        lora: put adapters on the decoder; everything else is frozen.
        latent_heads: train LatentHeads, new ones where the folder has none. Those of a folder are always loaded.
        feed: stage1's inputs at the latents.
        scaffold: train a TargetEncoder, with train_vision over a copy of the tower; everything else is frozen.

    Raises:
        UserError: no whole model of a known family in safetensors, or attention or kernels cannot run here.
    """
    from transformers.integrations import HfDeepSpeedConfig

    config = check_folder(folder)
    backend = choose_backend(attention, device, products or dtype, head_width_of(config.get_text_config()))
    check_device(kernels, device)
    register()
    if tower is None and (scaffold is not None or not train_vision):
        tower = load_tower(folder, config, dtype, device, attention)
    # from_pretrained finds the configuration through a weak reference: the name keeps it alive for the load.
    alive = HfDeepSpeedConfig(ds_config) if ds_config is not None else None
    whole = open_weights(
        FAMILIES[config.model_type].model_class(),
        folder,
        dtype=dtype,
        attn_implementation={"": "sdpa", "text_config": INTERFACE_NAME, "vision_config": "sdpa"},
    )
    del alive
    visual = whole.model.visual
    attend_in_segments(visual, attention, device)
    if train_vision and checkpointing:
        visual.gradient_checkpointing_enable({"use_reentrant": False})
    matrix = whole.lm_head.weight
    budget = loss_chunk_bytes or chunk_budget(torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0)
    rows, head = (None, LossHead(matrix, budget)) if lora is None else _adapted(whole, lora, budget, device)
    grounded = stage == "stage1"
    own = feed == "own"
    how = Forward(
        grounded, reduction, backend, checkpointing, latent_loss, detach_latents, train_targets, split, kernels, own
    )
    encoder = None
    if scaffold is not None:
        encoder = new_encoder(whole, config, scaffold, visual if train_vision else None, device)
        visual = None
    said = "latent_heads" in (getattr(config, "mirage", None) or {})
    heads = load_heads(folder, said, config.get_text_config().hidden_size, device, dtype, latent_heads)
    visual = visual if train_vision else None
    model = MirageModel(whole.model.language_model, head, visual, how, lora, rows, heads, encoder)
    return Loaded(model.to(device) if ds_config is None else model, tower, config)
