"""Changes to what a run has left on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirage_ds.engine.manifest import entry_of, read_manifest, write_manifest


def rewrite(state: Path, values: dict[str, Any]) -> None:
    """Change what a checkpoint says of itself, and its manifest with it."""
    state.write_text(json.dumps(json.loads(state.read_text()) | values))
    others = [entry for entry in read_manifest(state.parent) or [] if entry.name != state.name]
    write_manifest(state.parent, [*others, entry_of(state.parent, state)])
