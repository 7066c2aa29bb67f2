"""A model's shape from its config.json or a public name, by transformers' own class, without importing it.

H hidden, I inner width of the MLP, V vocabulary rows, L layers, Hq and Hkv heads, D head width.

Another process makes it (model/describe.py), once for each config.json and version of transformers: it is kept in the
cache.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.config.run import cache_folder
from mirage_ds.errors import UserError, reason, strict_json
from mirage_ds.files import write_atomically
from mirage_ds.model.family import check_kind
from mirage_ds.model.presets import preset
from mirage_ds.model.shape import Shape

MAKER = "mirage_ds.model.describe"


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


def block_of(model: Shape) -> Block:
    """Return the text model's widths."""
    shapes, text, layer = model.shapes, model.config["text_config"], "model.layers.0."
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    return Block(
        hidden=hidden,
        inner=shapes[f"{layer}mlp.gate_proj.weight"][0],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        layers=model.layers("model.layers."),
        vocabulary=vocabulary,
        head=shapes[f"{layer}self_attn.q_proj.weight"][0] // text["num_attention_heads"],
        head_norms=f"{layer}self_attn.q_norm.weight" in shapes,
        deep=model.layers("visual.deepstack_merger_list."),
    )


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
        return describe(_read(path), str(path))
    # `Qwen/Qwen2.5-VL-7B-Instruct` is the hub's name of a public shape: nothing is fetched.
    found = preset(model.removeprefix("Qwen/").removesuffix("-Instruct"))
    if not found["text_config"]["vocab_size"]:
        raise UserError(f"--model {model}: its vocabulary is known once `mirage-ds init` has made it; give that folder")
    return describe(found, model)


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
    if kept.is_file():
        return Shape(*json.loads(kept.read_text()))
    if "torch" in sys.modules:
        # What costs seconds is here already.
        made = importlib.import_module(MAKER).described(values, where)
    else:
        made = _made_elsewhere(text, where)
    # A cache that cannot be written costs seconds each time, and no more.
    with suppress(OSError):
        write_atomically(kept, made)
    return Shape(*json.loads(made))


def _made_elsewhere(text: str, where: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", MAKER, where], input=text, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"{MAKER} failed:\n{done.stderr}")
    return done.stdout
