"""The run folder: what was asked, with what, so that a run can be repeated from its folder.

<save_model_path>/            the trained model, as plain transformers opens it; adapter/, where one is merged into it
<save_model_path>/run/        config.yaml, ds_config.json, versions.json, run.json (what it came to before its first
                              step), log.jsonl, events.jsonl, tensorboard/, checkpoints/; not_finite.jsonl, if a step
                              was skipped; trackers.json, if W&B or MLflow follow it; faults.jsonl, if a guard ended it
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mirage_ds.config import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically

PACKAGES = ("mirage-ds", "torch", "transformers", "deepspeed", "accelerate", "datasets", "flash-attn", "peft")


def claim(folder: Path, overwrite: bool, resume: bool = False) -> Path:
    """Return the folder for a run's own files; refuse one that holds an earlier run or a model.

    Args:
        overwrite: start over in it: its log, its checkpoints, its best model and its adapter are deleted.
        resume: an earlier run is welcome.

    Raises:
        UserError: something is there already and --overwrite was not given.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save_model_path {folder}: is a file; give a folder")
    for name in ("config.json", "run"):
        if (folder / name).exists() and not (overwrite or resume):
            raise UserError(
                f"--save_model_path {folder}: holds an earlier run ({name}); give another folder, --resume auto to "
                "continue it, or --overwrite to start over in it"
            )
    if resume and (folder / "config.json").exists() and not (folder / "run" / "checkpoints" / "latest").exists():
        raise UserError(
            f"--resume auto: {folder} holds a finished model and no checkpoint to continue from; give another "
            "--save_model_path, or --overwrite to train it again"
        )
    try:
        (folder / "run").mkdir(parents=True, exist_ok=True)
        # It asked the run before this one to stop.
        stop_file(folder).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--save_model_path {folder}: cannot be written ({error.strerror})") from None
    if overwrite:
        for old in (*("log.jsonl", "events.jsonl", "not_finite.jsonl", "skipped.jsonl", "faults.jsonl"), "run.json",
                    "trackers.json"):  # fmt: skip
            (folder / "run" / old).unlink(missing_ok=True)
        for old in ("checkpoints", "tensorboard"):
            shutil.rmtree(folder / "run" / old, ignore_errors=True)
        for old in ("best", "adapter"):
            shutil.rmtree(folder / old, ignore_errors=True)
    return folder / "run"


def stop_file(folder: Path) -> Path:
    """Return the file that asks a run to save and stop, once somebody makes it (`touch`)."""
    return folder / "run" / "stop"


def versions() -> dict[str, str | None]:
    """Return the versions of what computes, the machine's kind and the commit; None for a package that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found["git_commit"] = commit.stdout.strip() or None
    return found


def describe(folder: Path, config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Write the configuration as run, the DeepSpeed configuration as resolved, and the versions."""
    values = json.loads(config.model_dump_json(exclude_none=True))
    write_atomically(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    write_atomically(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    write_atomically(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")


def describe_start(folder: Path, facts: dict[str, Any]) -> None:
    """Write what a run came to before its first step: steps, ranks, rows."""
    write_atomically(folder / "run.json", json.dumps(facts, indent=2) + "\n")
