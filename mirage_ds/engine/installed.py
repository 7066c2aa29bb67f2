"""The versions of what computes here."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("mirage-ds", "torch", "transformers", "deepspeed", "accelerate", "datasets", "flash-attn", "peft")


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
