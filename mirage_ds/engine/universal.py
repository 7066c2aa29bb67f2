"""The universal form of a checkpoint: one file a parameter and state, which any number of ranks can load.

    checkpoints/global_step<N>/universal/            made by `mirage-ds checkpoint convert`, with its own manifest
    checkpoints/global_step<N>/.universal.partial/   being made, or left by a conversion that was killed

It lies inside its checkpoint, so that retention deletes both together. DeepSpeed does the conversion; it sees only
files whose hashes are the manifest's.
"""

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mirage_ds.engine.checkpoint import CONVERTIBLE, STATE_FILE, UNIVERSAL, check_whole, newest_whole, read_state
from mirage_ds.engine.manifest import (
    MANIFEST,
    Entry,
    checkpoints,
    entry_of,
    faults,
    read_manifest,
    step_of,
    write_manifest,
)
from mirage_ds.engine.private import shards_into_tensors, unheard
from mirage_ds.errors import UserError
from mirage_ds.files import sync

Say = Callable[[str], None]


def use_universal(ds_config: dict[str, Any], wanted: bool) -> None:
    """Tell DeepSpeed, before the engine is made, which form it will load; what the JSON says of it does not count."""
    block = ds_config.get("checkpoint", {})
    if wanted or block.get("load_universal"):
        ds_config["checkpoint"] = {**block, "load_universal": wanted}


def find(source: Path, say: Say) -> Path:
    """Return the checkpoint to convert, all its bytes compared with its manifest.

    Args:
        source: a checkpoint, or a --save_model_path folder, whose newest whole one is taken.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (source / STATE_FILE).is_file() or (source / MANIFEST).is_file():
        say(f"comparing the bytes of {source} with its manifest")
        check_whole(source)
        return source
    folder = _all_of(source)[0].parent
    say(f"comparing the bytes of the newest checkpoint in {folder} with its manifest")
    found = newest_whole(folder)
    if found is None:
        raise UserError(f"{folder} has lost its checkpoints meanwhile; try again")
    for sentence in found.passed_over:
        say(sentence)
    return found.place


def _all_of(source: Path) -> list[Path]:
    """List the checkpoints of a --save_model_path folder, oldest first; UserError where there is none."""
    found = checkpoints(source / "run" / "checkpoints")
    if not found:
        raise UserError(
            f"{source}: has no checkpoints (run/checkpoints/global_step<N>); name a checkpoint or a run's folder"
        )
    return found


def convert(source: Path, workers: int = 1, say: Say = print) -> str:
    """Make the universal form of a checkpoint; return one line that says what there is now.

    Args:
        source: see `find`.
        workers: processes at a time; each holds the whole shard of a rank.

    Raises:
        UserError: no whole checkpoint, one that cannot be converted, or no room; everything is then as it was.
    """
    place = find(source, say)
    target = place / UNIVERSAL
    state = read_state(place)
    if target.exists() and next(faults(target), None) is None:
        return f"{target}: is there already, and whole"
    files = read_manifest(place) or []
    if state.get("zero_stage") not in CONVERTIBLE:
        stage = state.get("zero_stage", 0)
        raise UserError(f"{place}: ZeRO stage {stage} cannot be converted; checkpoints of stages 1, 2 and 3 can")
    partial = place / f".{UNIVERSAL}.partial"
    try:
        # A conversion that was killed has left it; what it holds must not count as used.
        shutil.rmtree(partial, ignore_errors=True)
        _check_room(place, files)
        partial.mkdir()
        say("converting: first the shard of each rank, then each parameter")
        _convert(place, files, partial, workers)
        say("reading it back")
        written = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        for file in written:
            sync(file)
        write_manifest(partial, [entry_of(partial, file) for file in written])
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
        sync(place)
    except OSError as error:
        raise UserError(f"{place}: not converted: {error.filename or 'a file'}: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise UserError(f"{place}: a process of the conversion was killed; take fewer --workers or more RAM") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{target}: step {state['step']}, written by {state['world_size']} rank(s), {size_of(target) / 1e9:.3g} GB"


def _convert(place: Path, files: list[Entry], partial: Path, workers: int) -> None:
    # Links, so that DeepSpeed sees files of the manifest alone, and because it reads the paths as patterns.
    with tempfile.TemporaryDirectory(prefix="mirage_universal_") as scratch:
        source, target = Path(scratch, "in"), Path(scratch, "out")
        source.mkdir()
        for entry in files:
            (source / entry.name).symlink_to((place / entry.name).resolve())
        target.symlink_to(partial.resolve(), target_is_directory=True)
        try:
            with unheard():
                shards_into_tensors(source, target, workers)
        except RuntimeError as error:
            # So torch's zip writer reports a full disk.
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise OSError(None, str(error).splitlines()[0], str(partial)) from None


def needed_bytes(files: list[Entry]) -> int:
    """Return the room that a conversion takes at its largest.

    Fragments of every shard, then each parameter whole: twice the optimizer shards (12 bytes an element: weights and
    both moments in float32). Rank 0's shard once more, before it is emptied. Copies of the other files, and in float32
    what those hold in bfloat16. A twentieth for the heads of the many files.
    """
    shards = [entry.size for entry in files if "optim_states" in entry.name]
    others = sum(entry.size for entry in files) - sum(shards)
    return (2 * sum(shards) + max(shards, default=0) + 3 * others) * 21 // 20


def _check_room(place: Path, files: list[Entry]) -> None:
    needed, free = needed_bytes(files), shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place}: a conversion needs {needed / 1e9:.3g} GB beside it (about half of that stays), "
            f"{free / 1e9:.3g} GB are free; make room, or copy the checkpoint to a larger disk and convert it there"
        )


def print_list(source: Path, hashes: bool) -> None:
    """Print the checkpoints of a --save_model_path folder as a table, oldest first.

    Args:
        hashes: read every byte; False compares sizes alone.

    Raises:
        UserError: it has none.
    """
    found = _all_of(source)
    table = Table("step", "ranks", "GB", "whole", "universal", box=box.SIMPLE)
    for place in found:
        wrong, form = next(faults(place, hashes=hashes), None), place / UNIVERSAL
        damage = next(faults(form, hashes=hashes), None) if form.exists() else ""
        ranks = "?" if wrong else str(read_state(place).get("world_size", "?"))
        universal = "no" if damage == "" else _yes(damage)
        table.add_row(str(step_of(place)), ranks, f"{size_of(place) / 1e9:.3g}", _yes(wrong), universal)
    Console().print(table)


def _yes(wrong: str | None) -> str:
    return f"no: {wrong}" if wrong else "yes"


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
