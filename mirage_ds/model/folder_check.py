"""Whether a model folder agrees with itself: its weights with config.json, with their index and with the processor.

What transformers does not find in the files that it opens it makes up, and what it does not know it leaves out, both
without a word. Of a file only the header is read, but for a head that is stored although it is tied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from mirage_ds.errors import UserError, shown
from mirage_ds.model.family import FAMILIES, Family
from mirage_ds.model.folder import (
    ADAPTER_CONFIG,
    INDEX,
    MERGE,
    SINGLE,
    Stored,
    adapter_of,
    header_of,
    read_json,
    stored_tensors,
    weight_files,
    weight_map,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
# Keys of config.json, at any depth, and files of tools that quantise.
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# What stands beside, or in place of, a quantised weight: its scales, zeros, codes and tables.
QUANTISED_NAME = re.compile(
    r"scale|zero|quant|qweight|q_weight|qdata|q_invperm|packed|absmax|SCB|code|g_idx|_blocks|W_q|trellis|nf4|fp4|tables"
)
# The same for what is known by its whole name alone.
QUANTISED_LEAF = re.compile(r"(^|\.)(biases|suh|svh|meta|weight_shape|weight_format|centroids|indices)$")
# Buffers that older versions stored; they are computed anew.
BUFFER = re.compile(r"(^|\.)(rotary\w*\.(original_)?(inv_freq|cos_cached|sin_cached)|position_ids)$")
ADAPTER_NAME = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|token_adapter|ia3_\w+|oft_\w+)\.|\.lora_\w+$")
# Modules that trainers put around a module.
WRAPPERS = frozenset(("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
PROCESSOR_TYPE = re.compile(r"Qwen\w*VLImageProcessor\w*")
# Key of a processor → key of vision_config, and what the processor has where its file is silent.
PROCESSOR_KEYS = {
    "patch_size": ("patch_size", 14),
    "merge_size": ("spatial_merge_size", 2),
    "temporal_patch_size": ("temporal_patch_size", 2),
}
CHUNK_ROWS = 8192


def check_stored(folder: Path, config: PretrainedConfig, expected: Mapping[str, Sequence[int]]) -> None:
    """Refuse a folder whose weights are not exactly those of its config.json, or that contradicts itself.

    Args:
        expected: flat names and shapes of the parameters that `config` describes.

    Raises:
        UserError: one sentence that names the file.
    """
    family = FAMILIES[config.model_type]
    _refuse_quantised(folder)
    _refuse_adapter(folder)
    if getattr(config, "transformers_weights", None):
        raise UserError(
            f"{folder}/config.json: 'transformers_weights' has {config.transformers_weights} opened for {SINGLE}; "
            "rename the file and delete the key"
        )
    stored = stored_tensors(folder)
    _refuse_other_weights(folder, stored, family, expected)
    _compare_index(folder, stored)
    own: dict[str, str] = {}
    strange = []
    for name, one in stored.items():
        flat = family.opened_name(name)
        if flat and (flat in expected or flat == HEAD):
            if flat in own:
                raise UserError(f"{one.file}: holds {own[flat]} and {name}, which are the same; copy the model again")
            own[flat] = name
        elif not BUFFER.search(name):
            strange.append(name)
    _refuse_codes(stored, own.values(), strange)
    _compare_names(folder, family, stored, (own, strange), expected)
    for flat, shape in expected.items():
        if stored[own[flat]].shape != tuple(shape):
            raise UserError(
                f"{folder}: {flat} has shape {stored[own[flat]].shape}, config.json says {shape}; they do not belong "
                "together"
            )
    if HEAD in own and HEAD not in expected and not _same(stored, own[HEAD], own[EMBEDDING]):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but {own[HEAD]} in "
            f"{stored[own[HEAD]].file.name} is not {own[EMBEDDING]}; say false there, or take it out of the file"
        )


def _refuse_quantised(folder: Path) -> None:
    """Refuse what a configuration calls quantised, whatever the weights are: transformers would take its word."""
    for name in ("config.json", *QUANTISED_FILES):
        values = read_json(folder / name) if (folder / name).is_file() else None
        said = _quantisation(values) if name == "config.json" else values
        if said is not None:
            method = (said.get("quant_method") if isinstance(said, dict) else None) or shown(said)
            raise UserError(
                f"{folder}: this checkpoint is quantised ({method}, says {name}); give the original weights, or delete "
                f"that from {name} if these are the original ones"
            )


def _quantisation(values: Any) -> Any:
    """Return what config.json, or a part of it, says of quantisation; None where it says nothing."""
    if not isinstance(values, dict):
        return None
    own = [values[key] for key in QUANTISED_KEYS if values.get(key)]
    inner = (_quantisation(part) for part in values.values())
    return own[0] if own else next((said for said in inner if said is not None), None)


def _refuse_adapter(folder: Path) -> None:
    """Refuse an adapter beside the weights: with the first of these files, from_pretrained would put it on them.

    The one that training with --lora_rank writes stands in a folder of its own, and is merged into the weights.
    """
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            raise UserError(f"{folder}: holds {adapter_of(folder)} beside the model ({name}); {MERGE}, or move it away")


def _refuse_other_weights(
    folder: Path, stored: Mapping[str, Stored], family: Family, expected: Mapping[str, Sequence[int]]
) -> None:
    """Refuse a second set of weights that from_pretrained would pass over.

    Pickles and other formats (pytorch_model.bin, GGUF) may stand there: published folders have them beside, and no
    version opens them where there is a safetensors file.
    """
    opened, others = weight_files(folder), []
    for file in sorted(set(folder.glob("*.safetensors")).difference(opened)):
        try:
            names = header_of(file)
        except UserError:
            names = {}
        if any(map(ADAPTER_NAME.search, names)):
            raise UserError(f"{file}: holds an adapter beside the model; {MERGE}, or move it away")
        known = any(name in stored or family.opened_name(name) in expected for name in names)
        if known or file.name.startswith(("model", "shard-")):
            others.append(file.name)
    read = SINGLE if folder / SINGLE in opened else f"what {INDEX} names"
    if others:
        more = f" and {len(others) - 1} more file(s)" if others[1:] else ""
        raise UserError(
            f"{folder}: {others[0]}{more} would not be opened, only {read}; move it away if it is not this model's, "
            "else copy or download the model again"
        )


def _compare_index(folder: Path, stored: Mapping[str, Stored]) -> None:
    if not (folder / INDEX).is_file():
        return
    said = {name: folder / file for name, file in weight_map(folder / INDEX).items()}
    for name in sorted(said.keys() | stored.keys()):
        there = stored[name].file if name in stored else None
        if there != said.get(name) and not BUFFER.search(name):
            says = f"says {said[name].name}" if name in said else "does not name it"
            raise UserError(
                f"{folder}: {name} is in {there.name if there else 'no file'}, {INDEX} {says}; copy or download both "
                f"again, or delete the index where {SINGLE} is the whole model"
            )


def _refuse_codes(stored: Mapping[str, Stored], own: Iterable[str], strange: Iterable[str]) -> None:
    """Refuse weights that are integers or 8-bit floats, and what belongs to such."""
    coded = [name for name in own if stored[name].dtype not in FLOATS]
    for name in strange:
        leaf = name.rpartition(".weight.")[2].rpartition(".")[2]
        beside = "." in name and (QUANTISED_NAME.search(leaf) or QUANTISED_LEAF.search(name))
        if beside or stored[name].dtype[:2] in ("F8", "F4", "F6"):
            coded.append(name)
    if coded:
        first = stored[coded[0]]
        raise UserError(
            f"{first.file}: this checkpoint is quantised ({coded[0]} is there, as {first.dtype}); give the original "
            "weights, in bfloat16, float16 or float32"
        )


def _compare_names(
    folder: Path,
    family: Family,
    stored: Mapping[str, Stored],
    found: tuple[Mapping[str, str], Sequence[str]],
    expected: Mapping[str, Sequence[int]],
) -> None:
    """Refuse tensors that are missing, renamed or not the model's.

    Args:
        found: the model's own tensors, flat name → name; names of the others.
    """
    own, strange = found
    missing = expected.keys() - own.keys()
    adapters = [name for name in strange if ADAPTER_NAME.search(name)]
    if adapters:
        raise UserError(f"{stored[adapters[0]].file}: holds an adapter beside the weights ({adapters[0]}); {MERGE}")
    for name in strange:
        meant = _meant(name, family, missing)
        if meant:
            prefix = name.removesuffix(meant)
            how = f"take the prefix '{prefix}' off the names" if prefix != name else "rename them"
            raise UserError(
                f"{stored[name].file}: holds {name} for {meant}, so that transformers would not find it; {how}, and "
                "save the file again"
            )
    if missing:
        hint = "the folder is not whole"
        if missing == {HEAD}:
            hint = "an embedding model, which writes no text, or the folder is not whole"
        elif strange:
            hint = f"{strange[0]}, and {len(strange) - 1} more, are there and not the model's"
        raise UserError(f"{folder}: {len(missing)} tensor(s) missing, the first is {min(missing)}; {hint}")
    if strange:
        raise UserError(
            f"{stored[strange[0]].file}: holds {len(strange)} tensor(s) that config.json knows nothing of, the first "
            f"is {strange[0]}; they would be left out, so give the config.json that goes with them, or take them out"
        )


def _meant(name: str, family: Family, missing: Collection[str]) -> str | None:
    """Return the name that transformers would find, for a tensor that has something put before or into its name."""
    parts = name.split(".")
    for at in range(len(parts)):
        tail = ".".join(parts[at:])
        if family.opened_name(tail) in missing:
            return tail
        for inner in (".".join(part for part in parts[at:] if part not in WRAPPERS), family.written_name(tail)):
            if family.opened_name(inner) in missing:
                return inner
    return None


def _same(stored: Mapping[str, Stored], one: str, other: str) -> bool:
    """Compare two matrices value by value, a few rows in memory at a time."""
    if stored[one].shape != stored[other].shape:
        return False
    with safe_open(stored[one].file, "pt") as first, safe_open(stored[other].file, "pt") as second:
        pair = first.get_slice(one), second.get_slice(other)
        rows = range(0, stored[one].shape[0], CHUNK_ROWS)
        return all(torch.equal(*(part[at : at + CHUNK_ROWS].float() for part in pair)) for at in rows)


def check_processor(config: PretrainedConfig, folders: Sequence[Path]) -> None:
    """Refuse an image processor that cuts pictures otherwise than the model's tower takes them.

    Args:
        folders: the first that has one gives it.

    Raises:
        UserError: names the file and the key.
    """
    for folder in folders:
        for name in PROCESSOR_FILES:
            values = read_json(folder / name) if (folder / name).exists() else None
            if isinstance(values, dict) and name == PROCESSOR_FILES[0]:
                # Older versions put other things there.
                values = values.get("image_processor")
            if isinstance(values, dict):
                _compare_processor(config, folder / name, values)
                return


def _compare_processor(config: PretrainedConfig, file: Path, values: Mapping[str, Any]) -> None:
    kind: Any = values.get("image_processor_type", values.get("feature_extractor_type"))
    what = None
    if isinstance(kind, str) and not PROCESSOR_TYPE.fullmatch(kind):
        what = f"image_processor_type is {shown(kind)}"
    for key, (known, default) in PROCESSOR_KEYS.items():
        tower = getattr(config.vision_config, known)
        if values.get(key, default) != tower:
            what = f"{key} is {shown(values.get(key, default))}, config.json's vision_config has {tower} ({known})"
    if what:
        title = FAMILIES[config.model_type].title
        raise UserError(f"{file}: {what}; copy the file that goes with this {title}")
