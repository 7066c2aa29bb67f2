"""Files that are whole or not there, outputs that can be written, and which files of a folder are ours.

Imports no torch.
"""

import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from mirage_ds.errors import UserError, is_text, shown

# Where config.json says how the model was trained; plain transformers carries the key along.
TRAINED_KEY = "mirage"
# What transformers loads as the model's `generate`, where it may.
GENERATE = "custom_generate/generate.py"
# Weights that make latents of hidden states (model/latent_heads.py) or stand in their place at first (LatentInputs in
# model/latents.py), likewise. In a folder of its own: what lies beside
# config.json is exactly what that describes, and vLLM opens every safetensors file there.
HEADS = "latent_heads/heads.safetensors"
# What --stage scaffold saves in place of a model (model/targets.py).
TARGETS, TARGETS_NOTE = "latent_targets.safetensors", "latent_targets.json"
# What the system says of a file that cannot be written or opened, whoever asks: the user's to fix.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EIO, errno.ESTALE}
TROUBLES = NO_ROOM | UNWRITABLE
# A block: less may find room on a full disk.
TRIED_BYTES = 4096
# The weights that a save writes: one file, or shards and their index.
_OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# Weights of anybody, and what else makes a model folder.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack)(\.index\.json)?")
_MODEL_FILES = frozenset(
    """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json merges.txt
    special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json preprocessor_config.json
    video_preprocessor_config.json processor_config.json adapter_config.json""".split()  # noqa: SIM905
)
_NOTES = ("best.json", "README.md", "adapter_model.safetensors", TARGETS, TARGETS_NOTE)


def shipped() -> Path:
    """Return the folder of launch/, examples/, ds_configs/, data/ and docs/, laid out as in the repository.

    It is inside an installed package, and in a checkout the repository's root.
    """
    inside = Path(__file__).parent / "shipped"
    return inside if inside.is_dir() else Path(__file__).parents[1]


def pages() -> dict[str, Path]:
    """Map the names of the pages to their files: "lora" is docs/lora.md, "data/README" is data/README.md."""
    root = shipped()
    folders = ("docs", "data", "ds_configs", "launch", "examples")
    files = [root / "README.md", *(file for folder in folders for file in sorted((root / folder).rglob("*.md")))]
    return {str(file.relative_to(root).with_suffix("")).removeprefix("docs/"): file for file in files}


def shipped_files(folder: str) -> list[Path]:
    """List the files of a folder that the package ships."""
    found = sorted((shipped() / folder).rglob("*"))
    return [file for file in found if file.is_file() and "__pycache__" not in file.parts]


def write_shipped(copies: Mapping[str, Path]) -> list[Path]:
    """Write folders that the package ships; a file that is there with the same content stays.

    Args:
        copies: name of a shipped folder → folder to write.

    Returns:
        The files that are there now, in order.

    Raises:
        UserError: a file is there with other content; then none is written.
    """
    wanted = {
        target / file.relative_to(shipped() / name): file
        for name, target in copies.items()
        for file in shipped_files(name)
    }
    for place, file in wanted.items():
        if os.path.lexists(place) and not (place.is_file() and place.read_bytes() == file.read_bytes()):
            raise UserError(f"{place} is there and is another file; move it, or name another folder")
    for place, file in wanted.items():
        write_atomically(place, file.read_bytes())
        place.chmod(file.stat().st_mode)
    return list(wanted)


def is_own_weights(name: str) -> bool:
    """Whether a save of ours writes weights under this name."""
    return _OUR_WEIGHTS.fullmatch(name) is not None


def is_model_file(name: str) -> bool:
    """Whether a file of this name is part of a model folder, whoever wrote it."""
    return name in _MODEL_FILES or _WEIGHTS.fullmatch(name) is not None


def delete_apart(folder: Path, name: str) -> None:
    """Delete what a save writes as GENERATE or HEADS, and its folder if nothing is left."""
    own = (folder / name).parent
    (folder / name).unlink(missing_ok=True)
    shutil.rmtree(own / "__pycache__", ignore_errors=True)
    with suppress(OSError):
        own.rmdir()


def delete_model(folder: Path) -> None:
    """Delete a model folder that we have written: the files that a save writes, and the folder if nothing is left."""
    if not folder.is_dir():
        return
    delete_model(folder / "adapter")
    for name in (GENERATE, HEADS):
        delete_apart(folder, name)
    for file in folder.iterdir():
        if file.is_file() and (file.name in _MODEL_FILES or file.name in _NOTES or is_own_weights(file.name)):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def move_others(old: Path, new: Path) -> None:
    """Delete a model folder that we have written once another has its place; what no save has written moves there."""
    delete_model(old)
    for path in old.iterdir() if old.is_dir() else ():
        if not (new / path.name).exists():
            path.rename(new / path.name)
        elif path.is_dir():
            move_others(path, new / path.name)
        else:
            # The new one has it too: a save writes it.
            path.unlink()
    if old.is_dir() and not any(old.iterdir()):
        old.rmdir()


def check_output(path: Path, flag: str, folder: bool = False) -> None:
    """Refuse, before the work, an output that could not be written after it. Folders on the way may be missing.

    A file of one block is written where it will lie, or in the nearest folder that there is, and removed.

    Args:
        flag: how the user names it.
        folder: it is a folder that gets files.

    Raises:
        UserError: says why.
    """
    if not is_text(str(path)):
        raise UserError(f"{flag} {shown(str(path))}: not UTF-8 text; choose another name")
    try:
        kind = _wrong_kind(path, folder)
        if not kind:
            _try_to_write(path.absolute(), folder)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror}); name another place") from None
    if kind:
        raise UserError(f"{flag} {path}: {kind}")


def _wrong_kind(path: Path, folder: bool) -> str:
    if not path.exists():
        return ""
    if folder:
        return "" if path.is_dir() else "is a file; give a folder"
    if path.is_dir():
        return "is a folder; give a file"
    return "" if path.is_file() else "is a device or a pipe; give a file"


def _try_to_write(path: Path, folder: bool) -> None:
    place = path if folder else path.parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    tried = place / f".{'' if folder else path.name}.{os.getpid()}"
    try:
        with tried.open("xb") as file:
            file.write(bytes(TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):
            tried.unlink()


def check_log(path: Path, flag: str) -> None:
    """Refuse, as check_output, a file that lines are to be added to; it may be a terminal or a pipe."""
    there = os.path.exists(path)
    if there and path.is_fifo():
        # To open it is to wait for its reader.
        return
    if there and not path.is_dir():
        try:
            path.open("ab").close()
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be written ({error.strerror}); name another place") from None
        if not (path.is_file() and os.access(path.absolute().parent, os.W_OK)):
            return
    check_output(path, flag)


class Output(click.Path):
    """The type of an option or argument that names an output: tried (check_output) before the command begins."""

    def __init__(self, folder: bool = False):
        super().__init__(path_type=Path)
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; UserError where it cannot be written."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if ctx is None or not ctx.resilient_parsing:
            name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name if param else ""
            check_output(path, name, self.folder)
        return path


def users_error(error: Exception) -> str | None:
    """Say in one sentence what a user can fix, a file that cannot be written or opened too; None for another error."""
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in TROUBLES:
        return None
    how = "make room there" if error.errno in NO_ROOM else "change its rights, or name another place"
    return f"{error.filename or 'a file'}: {error.strerror}; {how}, and start again"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file, text as UTF-8, so that it is either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # The system says of a full disk only that it is full.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # Where it could not be made, unlink may fail with another error than "not there".
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_new(place: Path, content: bytes) -> None:
    """Write a small file whole or not at all, while others may write the same one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, renamed to it at the end; whatever goes wrong, it is removed."""
    target = target.absolute()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Put a file's content, or a folder's entries (new names, renames), on the disk; OSError when that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def own_modules_found() -> Iterator[None]:
    """Let modules in the working directory be found first, as `python -c` does; afterwards they are found last.

    Unlike `python -m`, an installed command does not look there by itself.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)
