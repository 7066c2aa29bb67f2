"""The checkpoints of a run by their names and manifests. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mirage_ds.engine.manifest import faults


def is_whole(checkpoint: Path) -> bool:
    """Tell whether its files are all there, with the sizes that were written."""
    return next(faults(checkpoint, hashes=False), None) is None


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first, damaged ones too."""
    found = [path for path in folder.glob("global_step*") if path.name.removeprefix("global_step").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps that a checkpoint has taken."""
    return int(checkpoint.name.removeprefix("global_step"))


def candidates(folder: Path) -> list[Path]:
    """List the checkpoints to try: the one that `latest` names, then those before it; all where it names none."""
    found = checkpoints(folder)[::-1]
    try:
        named = folder / (folder / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return found
    return [one for one in found if step_of(one) <= step_of(named)] if named in found else found
