"""A model's shape from its config.json, without transformers.

H hidden, I inner width of the MLP, V vocabulary rows, L layers, Hq and Hkv heads, D head width.

Two layouts are read: the nested one (`text_config`, `vision_config`) and the older public checkpoints' flat one, whose
text keys stand at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.errors import UserError, reason, shown, strict_json
from mirage_ds.model.family import check_kind
from mirage_ds.model.presets import preset

TEXT_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size"),
)
# What a config.json leaves out has the default of transformers' class: up to 4.49 it wrote only what differs from it.
_PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
VISION_DEFAULTS: dict[str, dict[str, int]] = {
    "qwen2_5_vl": _PATCHES | {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "out_hidden_size": 3584},
    "qwen2_vl": _PATCHES | {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
    "qwen3_vl": _PATCHES
    | {"patch_size": 16, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 3584}
    | {"num_position_embeddings": 2304},
}
DEEPSTACK_DEFAULT = [8, 16, 24]


class Parameter(NamedTuple):
    """One parameter.

    Attributes:
        name: without the layer's number.
        elements: of it.
        matrix: more than one dimension; decides the weight-decay group.
    """

    name: str
    elements: int
    matrix: bool


class Block(NamedTuple):
    """Widths of the text model.

    Attributes:
        hidden: H; inner: I; heads: Hq; kv_heads: Hkv; layers: L; vocabulary: V.
        head: D where it is not H / Hq.
        head_norms: each head's queries and keys have a norm, and the projections no biases.
        deep: layers behind which DeepStack adds image features.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    head: int | None = None
    head_norms: bool = False
    deep: int = 0

    @property
    def head_width(self) -> int:
        """D."""
        return self.head or self.hidden // self.heads

    @property
    def width(self) -> int:
        """Hq · D."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Hkv · D."""
        return self.kv_heads * self.head_width


def read_shape(model: str) -> dict[str, Any]:
    """Find the configuration of a model and bring it into the nested layout.

    Args:
        model: a folder with a config.json, that file itself, or one of the public shapes by name.

    Returns:
        `model_type`, `text_config` and `vision_config` with at least TEXT_KEYS, `tie_word_embeddings`, and the family's
        keys of VISION_DEFAULTS, as mirage_ds.scale.sizes takes it.

    Raises:
        UserError: no such folder or shape, or another family of models.
    """
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise UserError(f"--model {model}: no config.json there; give a model folder or a public shape's name")
    if path.is_file():
        return _normalised(_read(path), str(path))
    # `Qwen/Qwen2.5-VL-7B-Instruct` is the hub's name of a public shape: nothing is fetched.
    found = preset(model.removeprefix("Qwen/").removesuffix("-Instruct"))
    if not found["text_config"]["vocab_size"]:
        raise UserError(f"--model {model}: its vocabulary is known once `mirage-ds init` has made it; give that folder")
    return _normalised(found, model)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = strict_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({reason(error)}); copy the model's own") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy the model's own") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object, found {type(values).__name__}; copy the model's own")
    check_kind(values, path)
    return values


def _normalised(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = values["model_type"]
    text, vision = _part(values, "text_config", values, name), _part(values, "vision_config", None, name)
    made: dict[str, Any] = {
        "model_type": kind,
        "text_config": {key: _count(text, key, name) for key in TEXT_KEYS},
        "vision_config": {key: _count({key: one, **vision}, key, name) for key, one in VISION_DEFAULTS[kind].items()},
    }
    shape = made["text_config"]
    if kind == "qwen3_vl":
        made["vision_config"]["deepstack_visual_indexes"] = _listed(
            {"deepstack_visual_indexes": DEEPSTACK_DEFAULT, **vision}, "deepstack_visual_indexes", name
        )
        shape["head_dim"] = _count({"head_dim": 128, **text}, "head_dim", name)
    elif shape["hidden_size"] % shape["num_attention_heads"]:
        raise UserError(
            f"{name}: 'hidden_size' {shape['hidden_size']} is no multiple of 'num_attention_heads' "
            f"{shape['num_attention_heads']}; copy the model's own config.json"
        )
    # As transformers does: older files have the key in text_config alone.
    shape["tie_word_embeddings"] = bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return made


def _part(values: Mapping[str, Any], key: str, default: object, name: str) -> Mapping[str, Any]:
    block = values.get(key, default)
    if not isinstance(block, Mapping):
        raise UserError(f"{name}: '{key}' is {shown(block)}; copy the model's own config.json")
    return block


def _count(values: Mapping[str, Any], key: str, name: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise UserError(
            f"{name}: '{key}' is {shown(value)}; a whole number is needed, copy the model's own config.json"
        )
    return value


def _listed(values: Mapping[str, Any], key: str, name: str) -> list[int]:
    value = values.get(key)
    if not isinstance(value, list) or any(type(one) is not int for one in value):
        raise UserError(
            f"{name}: '{key}' is {shown(value)}; a list of numbers is needed, copy the model's own config.json"
        )
    return value


def block_of(config: Mapping[str, Any]) -> Block:
    """Return the text model's widths.

    Args:
        config: as read_shape returns it.
    """
    text = config["text_config"]
    return Block(
        hidden=text["hidden_size"],
        inner=text["intermediate_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        layers=text["num_hidden_layers"],
        vocabulary=text["vocab_size"],
        head=text.get("head_dim"),
        head_norms=config["model_type"] == "qwen3_vl",
        deep=len(config["vision_config"].get("deepstack_visual_indexes", ())),
    )


def trained_parameters(config: Mapping[str, Any]) -> list[Parameter]:
    """List the parameters of the text model, in the order of `MirageModel.parameters()`: ZeRO partitions each.

    Args:
        config: as read_shape returns it.
    """
    block = block_of(config)
    hidden = block.hidden
    attention = []
    for name, width in (("q_proj", block.width), ("k_proj", block.kv_width), ("v_proj", block.kv_width)):
        attention.append(Parameter(f"{name}.weight", hidden * width, True))
        if not block.head_norms:
            attention.append(Parameter(f"{name}.bias", width, False))
    attention.append(Parameter("o_proj.weight", hidden * block.width, True))
    if block.head_norms:
        attention += [Parameter(f"{name}.weight", block.head_width, False) for name in ("q_norm", "k_norm")]
    layer = [
        *attention,
        Parameter("gate_proj.weight", hidden * block.inner, True),
        Parameter("up_proj.weight", hidden * block.inner, True),
        Parameter("down_proj.weight", hidden * block.inner, True),
        Parameter("input_layernorm.weight", hidden, False),
        Parameter("post_attention_layernorm.weight", hidden, False),
    ]
    embedding = Parameter("embed_tokens.weight", block.vocabulary * hidden, True)
    listed = [embedding, *layer * block.layers, Parameter("norm.weight", hidden, False)]
    if not config["text_config"]["tie_word_embeddings"]:
        listed.append(embedding._replace(name="lm_head.weight"))
    return listed
