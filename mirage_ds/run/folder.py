"""The run folder: what was asked, with what, so that a run can be repeated from its folder.

<save_model_path>/            the trained model, as plain transformers opens it; adapter/, where one is merged into it
<save_model_path>/run/        config.yaml, ds_config.json, versions.json, run.json (what it came to before its first
                              step), log.jsonl, events.jsonl, checkpoints/; STAGE/ (TensorBoard's files, which names
                              the run FOLDER/run/STAGE); odd_steps.jsonl, if a loss jumped or a step was skipped;
                              profile/, with --profile_steps; trackers.json, if W&B or MLflow follow it; faults.jsonl,
                              if a guard ended it; completions.jsonl, the answers of rl
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from mirage_ds.config.run import RunConfig, Stage
from mirage_ds.engine.versions import versions
from mirage_ds.errors import UserError
from mirage_ds.files import TARGETS_NOTE, TRAINED_KEY, check_output, delete_model, is_model_file, write_atomically
from mirage_ds.run.events import FILE, MODEL_BEGINS

# What a run writes into run/ at once: a folder of that name that has none of them is somebody else's.
OWN_FILES = ("config.yaml", "events.jsonl", "log.jsonl", "run.json", "versions.json", "stop")
# What starting over deletes, beside checkpoints and TensorBoard's files.
LOGS = ("log.jsonl", "events.jsonl", "odd_steps.jsonl", "skipped.jsonl", "faults.jsonl", "run.json", "trackers.json",
        "completions.jsonl")  # fmt: skip


def check(folder: Path, overwrite: bool, resume: bool = False, sources: Sequence[Path] = ()) -> None:
    """Refuse a folder that cannot be written, or that holds what this run would write over. It changes nothing.

    Args:
        overwrite: an earlier run in it is to be started over; what no run has written is safe also then.
        resume: an earlier run is welcome.
        sources: model folders that the run starts from.

    Raises:
        UserError: says what is there, and what to do.
    """
    check_output(folder, "--save_model_path", folder=True)
    try:
        stranger = _stranger(folder, _began(folder), _saved(folder))
    except OSError as error:
        raise UserError(f"--save_model_path {folder}: cannot be read ({error.strerror}); give another folder") from None
    if stranger:
        raise UserError(
            f"--save_model_path {folder}: holds {stranger}, which no run has written, and a trained model would "
            "replace it or stand beside it; give a new folder, or move it away"
        )
    for name in ("config.json", "run"):
        if (folder / name).exists() and not (overwrite or resume):
            raise UserError(
                f"--save_model_path {folder}: holds an earlier run ({name}); give another folder, --resume auto to "
                "continue it, or --overwrite to start over in it"
            )
    for source in sources if overwrite else ():
        place, own = source.resolve(), folder.resolve()
        if place == own or any((own / name) in (place, *place.parents) for name in ("best", "adapter", "run")):
            raise UserError(
                f"--save_model_path {folder}: --overwrite would delete {source}, which the run starts from; give "
                "another folder"
            )
    done = any((folder / name).exists() for name in ("config.json", TARGETS_NOTE))
    if resume and done and not (folder / "run" / "checkpoints" / "latest").exists():
        raise UserError(
            f"--resume auto: {folder} holds a finished model and no checkpoint to continue from; give another "
            "--save_model_path, or --overwrite to train it again"
        )


def _began(folder: Path) -> bool:
    own = folder / "run"
    # A checkpoint alone may have been brought here to be gone on with.
    return any((own / name).is_file() for name in OWN_FILES) or any(own.glob("checkpoints/global_step*/mirage_*.json"))


def _saved(folder: Path) -> bool:
    """Whether the model files in a folder are those of a run: of a save that has ended, or that was interrupted."""
    try:
        if TRAINED_KEY in json.loads((folder / "config.json").read_bytes()):
            return True
    except (OSError, ValueError, TypeError):
        # None, or no model's.
        pass
    events = folder / "run" / FILE
    return events.is_file() and f'"{MODEL_BEGINS}"'.encode() in events.read_bytes()


def _stranger(folder: Path, began: bool, saved: bool) -> str:
    """Name what a run would write over and no run has written; nothing where there is none."""
    own = folder / "run"
    if os.path.lexists(own) and not began and (not own.is_dir() or any(own.iterdir())):
        return "run"
    for name, sign in (("best", "best.json"), ("adapter", "adapter_config.json")):
        place = folder / name
        ours = (began or saved) and (place / sign).is_file()
        if os.path.lexists(place) and not ours and (not place.is_dir() or any(place.iterdir())):
            return name
    if saved or not folder.is_dir():
        return ""
    return next((file for file in sorted(os.listdir(folder)) if is_model_file(file)), "")


def claim(folder: Path, overwrite: bool, resume: bool = False) -> Path:
    """Return the folder for a run's own files; refuse one that `check` refuses.

    Args:
        overwrite: start over in it: its log, its checkpoints, its best model and its adapter are deleted.
        resume: an earlier run is welcome.

    Raises:
        UserError: see check.
    """
    check(folder, overwrite, resume)
    try:
        (folder / "run").mkdir(parents=True, exist_ok=True)
        # It asked the run before this one to stop.
        stop_file(folder).unlink(missing_ok=True)
        if overwrite:
            _start_over(folder)
    except OSError as error:
        raise UserError(f"--save_model_path {folder}: cannot be written ({error.strerror})") from None
    return folder / "run"


def _start_over(folder: Path) -> None:
    """Delete an earlier run; its model stays until the new one takes its place."""
    if not (folder / "config.json").exists() and _saved(folder):
        # Half of a save: without the events, nobody would know any more whose it is.
        delete_model(folder)
    for old in LOGS:
        (folder / "run" / old).unlink(missing_ok=True)
    delete_checkpoints(folder / "run" / "checkpoints")
    # The last is where TensorBoard's files were at first.
    for name in (*get_args(Stage), "tensorboard"):
        _delete(folder / "run" / name, re.compile(r"events\.out\.tfevents\..*"))
    for old in ("best", "adapter"):
        delete_model(folder / old)


def delete_checkpoints(folder: Path) -> None:
    """Delete a run's checkpoints, and the folder if nothing else lies in it."""
    _delete(folder, re.compile(r"\.?global_step\d+(\.partial(-old)?)?|latest(_universal)?|zero_to_fp32\.py"))


def _delete(folder: Path, names: re.Pattern[str]) -> None:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if names.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def stop_file(folder: Path) -> Path:
    """Return the file that asks a run to save and stop, once somebody makes it (`touch`)."""
    return folder / "run" / "stop"


def describe(folder: Path, config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Write the configuration as run, the DeepSpeed configuration as resolved, and the versions."""
    values = json.loads(config.model_dump_json(exclude_none=True))
    write_atomically(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    write_atomically(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    write_atomically(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
