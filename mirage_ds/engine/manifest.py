"""The checkpoints of a run on disk: their names, their manifests (size and SHA-256 of each file), and their faults.

Imports no torch.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mirage_ds.files import write_atomically

MANIFEST = "mirage_manifest.json"
FORMAT = 1


class Entry(NamedTuple):
    """One file of a checkpoint."""

    name: str
    size: int
    sha256: str


def entry_of(folder: Path, file: Path) -> Entry:
    """Read a file back from the disk; OSError when it cannot be read."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return Entry(str(file.relative_to(folder)), content.tell(), digest)


def write_manifest(folder: Path, entries: Iterable[Entry]) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    files = {entry.name: {"size": entry.size, "sha256": entry.sha256} for entry in sorted(entries)}
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")


def read_manifest(folder: Path) -> list[Entry] | None:
    """Return what the manifest lists; None where there is none or it is broken."""
    try:
        values = json.loads((folder / MANIFEST).read_text())
        return [Entry(name, int(one["size"]), str(one["sha256"])) for name, one in values["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def faults(folder: Path, share: int = 0, shares: int = 1, hashes: bool = True) -> Iterator[str]:
    """Say what is wrong with a checkpoint, a sentence a file.

    Args:
        share, shares: look at every `shares`-th file, from number `share`: ranks divide the reading.
        hashes: read every byte; False compares sizes alone.
    """
    entries = read_manifest(folder)
    if entries is None:
        yield f"{MANIFEST} is missing or broken: its writer did not finish"
        return
    for entry in entries[share::shares]:
        file = folder / entry.name
        try:
            size = file.stat().st_size
            if size != entry.size:
                yield f"{entry.name} has {size} bytes, {entry.size} were written"
            elif hashes and entry_of(folder, file) != entry:
                yield f"{entry.name} differs from what was written (SHA-256)"
        except OSError as error:
            yield f"{entry.name}: {error.strerror}"


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
