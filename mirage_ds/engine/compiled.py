"""DeepSpeed's compiled extensions: what a start will wait for, said before it waits. Needs no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirage_ds.engine.ds_config import offload_device


def needed(values: dict[str, Any]) -> list[str]:
    """Return the extensions that a resolved configuration makes DeepSpeed compile, by the names of their folders."""
    if values["optimizer"]["params"].get("torch_adam", True):
        return []
    return ["fused_adam" if offload_device(values, "optimizer") == "none" else "cpu_adam"]


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Return torch's folder of compiled extensions."""
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(environment.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def waits(values: dict[str, Any], folder: Path, host: str, now: float | None = None) -> list[str]:
    """Say what the engine's start waits for on this host; nothing where all is compiled.

    Args:
        folder: of compiled extensions; below it stands one folder an extension, or one more level for each Python.
        now: time.time().
    """
    lines = []
    for name in needed(values):
        places = [*folder.glob(name), *folder.glob(f"*/{name}")]
        locks = [place / "lock" for place in places if (place / "lock").exists()]
        for lock in locks:
            age = (time.time() if now is None else now) - lock.stat().st_mtime
            lines.append(
                f"{host}: waits for {lock}, {age:.0f} s old: another process compiles, or a killed one has left it; "
                "then remove it"
            )
        if not locks and not any((place / f"{name}.so").exists() for place in places):
            lines.append(f"{host}: compiles DeepSpeed's {name} into {folder} first, which takes some minutes, once")
    return lines


def say_waits(values: dict[str, Any]) -> None:
    """Print what this host's start waits for; one rank a host calls it."""
    for line in waits(values, extensions_folder(os.environ), os.uname().nodename):
        print(line, flush=True)  # noqa: T201  # no console exists yet
