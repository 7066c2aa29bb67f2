"""A model folder: where it is, which of its files hold the weights, and what stands in these.

Transformers opens model.safetensors, else the files that model.safetensors.index.json names, and nothing else.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mirage_ds.errors import UserError, reason, strict_json
from mirage_ds.files import TARGETS_NOTE

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.txt")
ADAPTER_CONFIG = "adapter_config.json"
TARGETS_FORMAT = 1
MERGE = "merge it into its base (PEFT's merge_and_unload) and give the merged folder"
LFS = b"version https://git-lfs"


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        dtype: as safetensors calls it: "BF16", "F8_E4M3".
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def resolve_folder(name: str, flag: str, cache_dir: Path | None, tick: Callable[[], None] = lambda: None) -> Path:
    """Return a local model folder: `name` itself, or the hub's snapshot of it.

    Args:
        tick: is called again and again while it is fetched.

    Raises:
        UserError: neither a folder with a config.json nor a hub id that can be fetched.
    """
    folder = Path(name) if Path(name).is_dir() else _download(name, flag, cache_dir, tick)
    try:
        names = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{flag} {name}: cannot be read ({error.strerror}); make it readable") from None
    if "config.json" not in names and ADAPTER_CONFIG in names:
        raise UserError(f"{flag} {name}: holds {adapter_of(folder)} and no model; {MERGE}")
    if "config.json" not in names and TARGETS_NOTE in names:
        how = "give it as --latent_targets to stage1, and here the model that it was trained for"
        raise UserError(f"{flag} {name}: holds learned targets (--stage scaffold) and no model; {how}")
    if "config.json" not in names:
        raise UserError(f"{flag} {name}: no config.json there; give a model folder (as --save_model_path made it)")
    return folder


def _download(name: str, flag: str, cache_dir: Path | None, tick: Callable[[], None]) -> Path:
    if flag == "--load_model_path" or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{flag} {name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class Telling(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            tick()
            return bool(super().update(n))

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(DOWNLOADED), tqdm_class=Telling))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{flag} {name}: no such folder, and the hub did not give it ({first})") from None


def read_targets(folder: Path) -> dict[str, Any]:
    """Read what a folder of --stage scaffold says of its encoder (model/targets.py).

    Raises:
        UserError: there is none, or one of another version.
    """
    file = folder / TARGETS_NOTE
    if not file.is_file():
        how = "give a folder that --stage scaffold saved"
        raise UserError(f"--latent_targets {folder}: no {TARGETS_NOTE} there; {how}")
    note = read_json(file)
    if not isinstance(note, dict) or note.get("format") != TARGETS_FORMAT:
        raise UserError(f"{file}: not of this version of mirage_ds; copy it again, or train the targets anew")
    return note


def adapter_of(folder: Path) -> str:
    """Name an adapter by its base, where its adapter_config.json says one."""
    try:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    except (UserError, AttributeError):
        base = None
    return f"an adapter of {base}" if base else "an adapter"


def read_json(file: Path) -> Any:
    """Read a JSON file of a model; UserError where it is none or cannot be read."""
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


def weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor → file. UserError where it says no such thing."""
    values = read_json(index)
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
        files = sorted({folder / file for file in weight_map(index).values()})
        gone = [file for file in files if not file.is_symlink() and not file.is_file()]
        if gone:
            raise UserError(
                f"{index}: names {len(gone)} file(s) that are not there, the first is {gone[0].name}; copy or download "
                "the model again"
            )
        return files
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise UserError(
            f"{folder}: has {others[0]}, but no {INDEX}, without which only {SINGLE} is opened; copy the index too, or "
            "rename the file where it holds the whole model"
        )
    raise UserError(f"{folder}: no *.safetensors; convert other weight files first (pickles are never read)")


def header_of(file: Path) -> dict[str, Stored]:
    """Read the header of a safetensors file: name → tensor. UserError where it is not a whole one."""
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
        # numpy, so that planning commands need no torch; no value is read.
        with safe_open(file, "np") as tensors:
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
        header = header_of(file)
        twice = sorted(stored.keys() & header.keys())
        if twice:
            raise UserError(
                f"{folder}: {twice[0]} is in {stored[twice[0]].file.name} and in {file.name}; copy the model again"
            )
        stored |= header
    return stored
