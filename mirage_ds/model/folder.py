"""A model folder: which files hold its weights, and whether they agree with each other and with config.json.

Transformers opens model.safetensors, else the files that model.safetensors.index.json names, and nothing else. What it
does not find there it makes up, and what it does not know it leaves out, both without a word: so exactly these files
are looked at here. Of a file only the header is read, but for a head that is stored although it is tied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mirage_ds.errors import UserError, reason, shown, strict_json
from mirage_ds.model.family import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.txt")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
LFS = b"version https://git-lfs"
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


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        dtype: as safetensors calls it: "BF16", "F8_E4M3".
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def resolve_folder(name: str, flag: str, cache_dir: Path | None) -> Path:
    """Return a local model folder: `name` itself, or the hub's snapshot of it.

    Raises:
        UserError: neither a folder with a config.json nor a hub id that can be fetched.
    """
    folder = Path(name)
    if folder.is_dir():
        _need_config(folder, f"{flag} {name}")
        return folder
    if flag == "--load_model_path" or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{flag} {name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{flag} {name}: no such folder, and the hub did not give it ({first})") from None


def _need_config(folder: Path, called: str) -> None:
    try:
        names = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{called}: cannot be read ({error.strerror}); make it readable") from None
    if "config.json" not in names and ADAPTER_CONFIG in names:
        raise UserError(f"{called}: holds {_adapter_of(folder)} and no model; {MERGE}")
    if "config.json" not in names:
        raise UserError(f"{called}: no config.json there; give a model folder (as --save_model_path made it)")


MERGE = "merge it into its base (PEFT's merge_and_unload) and give the merged folder"


def _adapter_of(folder: Path) -> str:
    try:
        base = _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    except (UserError, AttributeError):
        base = None
    return f"an adapter of {base}" if base else "an adapter"


def _json(file: Path) -> Any:
    try:
        text = file.read_bytes()
        if text.startswith(LFS):
            raise UserError(f"{file}: a pointer of Git LFS, not the file; run `git lfs pull` there")
        return strict_json(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({reason(error)}); copy the model's own") from None
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        what = f"a link to {file.readlink()}, which is not there" if file.is_symlink() else "no such file"
        return UserError(f"{file}: {what}; copy or download the model again")
    return UserError(f"{file}: cannot be read ({error.strerror}); make it readable")


def _weight_map(index: Path) -> dict[str, str]:
    values = _json(index)
    found = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{index}: has no 'weight_map' from tensors to files; copy the model's own")
    if not isinstance(values.get("metadata"), dict):
        raise UserError(f"{index}: has no 'metadata', which transformers needs; copy the model's own, or add {{}}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """List the files that from_pretrained opens.

    Raises:
        UserError: there are none, or the index names others than those that are there.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_symlink() or single.is_file():
        return [single]
    if index.is_symlink() or index.is_file():
        files = sorted({folder / file for file in _weight_map(index).values()})
        gone = [file for file in files if not file.is_symlink() and not file.is_file()]
        if gone:
            raise UserError(
                f"{index}: names {len(gone)} file(s) that are not there, the first is {gone[0].name}; copy or download "
                "the model again"
            )
        return files
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if any(re.search(r"-of-\d+\.", name) for name in others):
        raise UserError(f"{folder}: has {others[0]}, but no {INDEX}, without which no shard is opened; copy it too")
    if others:
        raise UserError(
            f"{folder}: has {others[0]}, but weights are opened as {SINGLE} or through {INDEX} alone; rename the file "
            "where it holds the whole model, else copy the model's own"
        )
    raise UserError(f"{folder}: no *.safetensors; convert other weight files first (pickles are never read)")


def _header(file: Path) -> dict[str, Stored]:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS))
    except OSError as error:
        raise _unreadable(file, error) from None
    if start == LFS:
        raise UserError(f"{file}: a pointer of Git LFS, not the weights; run `git lfs pull` there")
    if not start:
        raise UserError(f"{file}: an empty file; copy it again")
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  # safe_open is no dict
            return {name: Stored(file, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from None


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Read the headers of the files that from_pretrained opens: name as it stands there → tensor.

    Raises:
        UserError: a file is not there or not whole, or two of them hold the same tensor.
    """
    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        header = _header(file)
        twice = sorted(stored.keys() & header.keys())
        if twice:
            raise UserError(
                f"{folder}: {twice[0]} is in {stored[twice[0]].file.name} and in {file.name}; copy the model again"
            )
        stored |= header
    return stored


def check_stored(folder: Path, config: PretrainedConfig, expected: Mapping[str, tuple[int, ...]]) -> None:
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
    own, strange = {}, []
    for name, one in stored.items():
        flat = family.opened_name(name)
        if flat in expected or flat == HEAD:
            if flat in own:
                raise UserError(f"{one.file}: holds {own[flat]} and {name}, which are the same; copy the model again")
            own[flat] = name
        elif not BUFFER.search(name):
            strange.append(name)
    _refuse_codes(stored, own.values(), strange)
    _compare_names(folder, family, stored, (own, strange), expected)
    for flat, shape in expected.items():
        if stored[own[flat]].shape != shape:
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
        values = _json(folder / name) if (folder / name).is_file() else None
        said = _quantisation(values) if name == "config.json" else values
        if said is not None:
            raise UserError(
                f"{folder}: this checkpoint is quantised ({_method(said)}, says {name}); give the original weights, or "
                f"delete that from {name} if these are the original ones"
            )


def _quantisation(values: Any) -> Any:
    """Return what config.json, or a part of it, says of quantisation; None where it says nothing."""
    if not isinstance(values, dict):
        return None
    own = [values[key] for key in QUANTISED_KEYS if values.get(key)]
    inner = (_quantisation(part) for part in values.values())
    return own[0] if own else next((said for said in inner if said is not None), None)


def _method(said: Any) -> str:
    """Name a way of quantising for people."""
    if not isinstance(said, dict):
        return shown(said)
    inner = said.get("quantization")
    inner = inner if isinstance(inner, dict) else said
    words = [str(inner[key]) for key in ("quant_method", "quant_algo", "format") if inner.get(key)]
    bits = [f"{inner['bits']} bits"] if "bits" in inner else []
    return " ".join(words + bits) or shown(said)


def _refuse_adapter(folder: Path) -> None:
    """Refuse an adapter beside the weights: with the first of these files, from_pretrained would put it on them.

    The one that training with --lora_rank writes stands in a folder of its own, and is merged into the weights.
    """
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            raise UserError(
                f"{folder}: {_adapter_of(folder)} ({name}) stands beside the model; {MERGE}, or move it away where it "
                "is merged already"
            )


def _refuse_other_weights(
    folder: Path, stored: Mapping[str, Stored], family: Family, expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a second set of weights that from_pretrained would pass over.

    Pickles and other formats (pytorch_model.bin, GGUF) may stand there: published folders have them beside, and no
    version opens them where there is a safetensors file.
    """
    opened = weight_files(folder)

    def holds(file: Path) -> bool:
        try:
            names = _header(file)
        except UserError:
            names = {}
        return file.name.startswith(("model", "shard-")) or any(
            name in stored or family.opened_name(name) in expected for name in names
        )

    others = [file.name for file in sorted(folder.glob("*.safetensors")) if file not in opened and holds(file)]
    read = SINGLE if folder / SINGLE in opened else f"what {INDEX} names"
    if others:
        more = f" and {len(others) - 1} more file(s)" if others[1:] else ""
        raise UserError(
            f"{folder}: {others[0]}{more} would not be opened, only {read}; move it away if it is not this model's, "
            "else copy or download the model again"
        )
    if folder / SINGLE in opened and (folder / INDEX).is_file():
        strange = sorted(set(_weight_map(folder / INDEX).values()) - {SINGLE})
        if strange:
            raise UserError(
                f"{folder / INDEX}: names {strange[0]}, which is not there, and {SINGLE} would be opened; delete the "
                f"index where {SINGLE} holds the whole model"
            )


def _compare_index(folder: Path, stored: Mapping[str, Stored]) -> None:
    if not (folder / INDEX).is_file():
        return
    said = {name: folder / file for name, file in _weight_map(folder / INDEX).items()}
    for name in sorted(said.keys() | stored.keys()):
        there = stored[name].file if name in stored else None
        if there != said.get(name) and not BUFFER.search(name):
            says = f"says {said[name].name}" if name in said else "does not name it"
            raise UserError(
                f"{folder}: {name} is in {there.name if there else 'no file'}, {INDEX} {says}; copy or download both "
                "again"
            )


def _refuse_codes(stored: Mapping[str, Stored], own: Iterable[str], strange: Iterable[str]) -> None:
    """Refuse weights that are integers or 8-bit floats, and what belongs to such."""
    coded = [name for name in own if stored[name].dtype not in FLOATS]
    for name in strange:
        leaf = name.rpartition(".weight.")[2].rpartition(".")[2]
        if QUANTISED_NAME.search(leaf) or QUANTISED_LEAF.search(name) or stored[name].dtype[:2] in ("F8", "F4", "F6"):
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
    expected: Mapping[str, tuple[int, ...]],
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
            hint = "copy it too, or have config.json tie it to the embedding (tie_word_embeddings)"
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
            values = _json(folder / name) if (folder / name).exists() else None
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
