"""The small files of a saved model folder, in the spelling of its base: what opened the base opens what became of it.

Releases of transformers call the same things by other names (rope_scaling and rope_parameters, torch_dtype and dtype,
additional_special_tokens and extra_special_tokens) and read only those of their time. So nothing is written anew that
the base says already: its files are taken, and what training has changed is put in.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirage_ds.data.encode import LATENT_TOKENS
from mirage_ds.files import TRAINED_KEY, write_atomically

# The public Mirage code says it at the top of config.json.
PUBLIC_KEYS = ("stage", "latent_size", "compress_strategy")
TOKENIZER = "tokenizer_config.json"
DTYPE_KEYS = {"dtype", "torch_dtype"}
# Read by some release of transformers, or by another program, and the same before and after training.
KEPT_OF_MODEL = ("generation_config.json", "video_preprocessor_config.json")
KEPT_OF_TOKENIZER = ("vocab.json", "merges.txt", "chat_template.json")


def read_trained(config: Any) -> dict[str, Any]:
    """Return what a model's configuration says of its training: stage, latent_size, compress_strategy, and maybe more.

    Args:
        config: transformers' own, of a folder that mirage_ds or the public Mirage code saved; of another, it is empty.
    """
    own = getattr(config, TRAINED_KEY, None)
    if own:
        return dict(own)
    if type(getattr(config, "latent_size", None)) is not int:
        return {}
    return {key: getattr(config, key) for key in PUBLIC_KEYS if hasattr(config, key)}


class Base(NamedTuple):
    """The small files of the model that is trained, read before its folder can change.

    Attributes:
        config: its config.json.
        tokenizer: its tokenizer_config.json, None where there is none.
        files: those that are the same before and after training, by name.
    """

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any] | None
    files: Mapping[str, bytes]


def read_base(source: Path, tokenizer: Any) -> Base:
    """Read the small files of a model folder, and of the one that its tokenizer was read from."""
    own = Path(tokenizer.name_or_path)
    files = [source / name for name in KEPT_OF_MODEL] + [own / name for name in KEPT_OF_TOKENIZER]
    return Base(
        json.loads((source / "config.json").read_bytes()),
        json.loads((own / TOKENIZER).read_bytes()) if (own / TOKENIZER).is_file() else None,
        {file.name: file.read_bytes() for file in files if file.is_file()},
    )


def config_json(base: Base, dtype: torch.dtype, trained: Mapping[str, Any], whole: str) -> str:
    """Return the config.json of a model that was trained from the base.

    Args:
        dtype: of its weights; trained: kept under TRAINED_KEY; whole: transformers' class.
    """
    values = copy.deepcopy(dict(base.config))
    blocks = [block for block in (values, *values.values()) if isinstance(block, dict)]
    name = str(dtype).removeprefix("torch.")
    for block in blocks:
        block.update(dict.fromkeys(block.keys() & DTYPE_KEYS, name))
    if not values.keys() & DTYPE_KEYS:
        values["dtype"] = name
    values |= {key: trained[key] for key in PUBLIC_KEYS if key in values and key in trained}
    values |= {"architectures": [whole], TRAINED_KEY: dict(trained)}
    return json.dumps(values, indent=2) + "\n"


def write_tokenizer(tokenizer: Any, base: Base, folder: Path) -> None:
    """Write a tokenizer, with the settings of the one that it was read from and the latent tokens put in."""
    tokenizer.save_pretrained(folder)
    if base.tokenizer is None:
        return
    values = copy.deepcopy(dict(base.tokenizer))
    if "additional_special_tokens" in values:
        known = values["additional_special_tokens"] or []
        names = {token["content"] if isinstance(token, dict) else token for token in known}
        values["additional_special_tokens"] = [*known, *(token for token in LATENT_TOKENS if token not in names)]
    if "added_tokens_decoder" in values:
        for number, token in tokenizer.added_tokens_decoder.items():
            # As transformers itself writes one.
            values["added_tokens_decoder"].setdefault(str(number), token.__getstate__())
    write_atomically(folder / TOKENIZER, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_image_processor(processor: Any, folder: Path) -> None:
    """Write an image processor; transformers up to 4.57 reads its limits from keys of their own, not from `size`."""
    processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"min_pixels": values["size"]["shortest_edge"], "max_pixels": values["size"]["longest_edge"]}
    write_atomically(file, json.dumps(values, indent=2) + "\n")
