"""A model's sizes from its config.json or a public name, counted by transformers' own class (model/load.py).

H hidden, I inner width of the MLP, V vocabulary rows, L layers, Hq and Hkv heads, D head width.

What was counted is kept in the cache, by config.json and version of transformers: only the first time imports torch.
"""

import hashlib
import importlib
import importlib.metadata
import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.config.run import cache_folder
from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically
from mirage_ds.model.family import check_kind
from mirage_ds.model.folder import read_json
from mirage_ds.model.presets import preset
from mirage_ds.model.shape import Shape


class Sizes(NamedTuple):
    """Elements and widths of a model.

    Attributes:
        matrices: elements of one decoder layer's matrices, in the order of its walk: q, k, v, o, gate, up, down.
        vectors: biases and norms of one decoder layer.
        layers: L.
        embedding: the input matrix, V · H.
        head: the output matrix; 0 where it is the embedding.
        norm: the final norm.
        vision: the vision tower with its merger.
        hidden: H; inner: I; heads: Hq; kv_heads: Hkv; head_width: D.
        head_norms: each head's queries and keys have a norm, and the projections no biases.
        deep: layers behind which DeepStack adds image features.
        drawing: the heads that latents are drawn by (model/latent_heads.py).
    """

    matrices: tuple[int, ...]
    vectors: int
    layers: int
    embedding: int
    head: int
    norm: int
    vision: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    head_norms: bool = False
    deep: int = 0
    drawing: int = 0

    @property
    def layer(self) -> int:
        """Elements of one layer's matrices."""
        return sum(self.matrices)

    @property
    def text(self) -> int:
        """Ψ, all elements of the text model, and of the heads beside it."""
        return self.layers * (self.layer + self.vectors) + self.embedding + self.head + self.norm + self.drawing

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.embedding // self.hidden

    @property
    def width(self) -> int:
        """Hq · D."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Hkv · D."""
        return self.kv_heads * self.head_width


def head_shapes(width: int) -> list[tuple[int, ...]]:
    """Shapes of the latent heads of a model of width H, in their order: weight and bias of μ, and of log σ."""
    return [(width, width), (width,), (1, width), (1,)]


def sizes(model: Shape, heads: bool = False) -> Sizes:
    """Count the elements of a model, and of latent heads."""
    shapes, text, layer = model.shapes, model.config["text_config"], "model.layers.0."
    (embedding,) = model.elements("model.embed_tokens.")
    return Sizes(
        matrices=tuple(model.elements(layer, matrices=True)),
        vectors=sum(model.elements(layer, matrices=False)),
        layers=model.layers("model.layers."),
        embedding=embedding,
        head=sum(model.elements("lm_head.")),
        norm=sum(model.elements("model.norm.")),
        vision=sum(model.elements("visual.")),
        hidden=(hidden := shapes["model.embed_tokens.weight"][1]),
        inner=shapes[f"{layer}mlp.gate_proj.weight"][0],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_width=shapes[f"{layer}self_attn.q_proj.weight"][0] // text["num_attention_heads"],
        head_norms=f"{layer}self_attn.q_norm.weight" in shapes,
        deep=model.layers("visual.deepstack_merger_list."),
        drawing=sum(map(math.prod, head_shapes(hidden))) if heads else 0,
    )


def trained_parameters(model: Shape, train_vision: bool = False, heads: bool = False) -> list[list[int]]:
    """List the elements of each trained parameter, matrices apart from the rest.

    These are the optimizer's two groups (engine.setup.weight_decay_groups), each in the order of the model.
    """
    shapes = [shape for name, shape in model.shapes.items() if train_vision or not name.startswith("visual.")]
    shapes += head_shapes(model.shapes["model.embed_tokens.weight"][1]) if heads else []
    return [[math.prod(shape) for shape in shapes if (len(shape) > 1) is matrices] for matrices in (True, False)]


def encoder_parameters(model: Sizes, k: int) -> list[list[int]]:
    """List what --stage scaffold trains as trained_parameters does: queries and three matrices, and a norm."""
    return [[k * model.hidden, *[model.hidden**2] * 3], [model.hidden]]


def read_shape(model: str) -> Shape:
    """Find a model and count its parameters.

    Args:
        model: a folder with a config.json, that file itself, or one of the public shapes by name.

    Raises:
        UserError: no such folder or shape, another family of models, or values that make no model.
    """
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise UserError(f"--model {model}: no config.json there; give a model folder or a public shape's name")
    if path.is_file():
        values = read_json(path)
        check_kind(values, path)
        return describe(values, str(path))
    # `Qwen/Qwen2.5-VL-7B-Instruct`, or that of its copies, is the hub's name of a public shape: nothing is fetched.
    public = re.fullmatch(r"(?:[\w.-]+/)?(qwen2\.5-vl-\d+b)(?:-instruct.*)?", model, re.IGNORECASE)
    found = preset(public[1] if public else model)
    if not found["text_config"]["vocab_size"]:
        raise UserError(f"--model {model}: its vocabulary is known once `mirage-ds init` has made it; give that folder")
    return describe(found, model)


def describe(values: dict[str, Any], where: str) -> Shape:
    """Count the parameters of a configuration.

    Args:
        values: what a config.json holds; where: how it is called in messages.

    Raises:
        UserError: transformers makes no model of it.
    """
    text = json.dumps(values, sort_keys=True)
    key = hashlib.sha256(f"{importlib.metadata.version('transformers')} {text}".encode()).hexdigest()
    kept = cache_folder(None) / "shapes" / f"{key}.json"
    if not kept.is_file():
        # Imports torch and transformers, which costs seconds.
        made: Shape = importlib.import_module("mirage_ds.model.load").described(values, where)
        # A cache that cannot be written costs them each time, and no more.
        with suppress(OSError):
            write_atomically(kept, json.dumps(made))
        return made
    return Shape(*json.loads(kept.read_text()))
