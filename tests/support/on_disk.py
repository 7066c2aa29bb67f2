"""What a run has left on the disk: read without what the clock wrote, and changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirage_ds.engine.manifest import entry_of, read_manifest, write_manifest

# What depends on the clock or the machine.
TIMES = (
    *("time", "seconds", "data_seconds", "samples_per_second", "tokens_per_second", "memory_gb"),
    *("decode_seconds", "scoring_seconds", "logp_seconds", "update_seconds"),
)


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]


def log_of(out: Path, evaluations: bool | None = False) -> list[dict[str, Any]]:
    """Return the steps of a run's log, or its evaluations (both: None), without TIMES."""
    lines = [line for line in lines_of(out) if evaluations in (None, "eval_loss" in line)]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(state: Path, values: dict[str, Any]) -> None:
    """Change what a checkpoint says of itself, and its manifest with it."""
    state.write_text(json.dumps(json.loads(state.read_text()) | values))
    others = [entry for entry in read_manifest(state.parent) or [] if entry.name != state.name]
    write_manifest(state.parent, [*others, entry_of(state.parent, state)])
