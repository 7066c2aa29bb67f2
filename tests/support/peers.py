"""Pythons of other programs' environments (benchmarks/venvs.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import venvs


def python_of(name: str, *here: Path) -> Path:
    """An environment's Python, built the first time; the test is skipped where no package index is in reach.

    Its place is the user's own, which the tests' variables hide.

    Args:
        here: packages to install anew, without what they need: they may have changed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME", raising=False)
        try:
            python = venvs.build(name)
            for package in here:
                venvs.uv("pip", "install", "--quiet", "--no-deps", "--reinstall", "--python", python, package)
        except venvs.LeftOut as why:
            pytest.skip(f"{name}: {why}")
    return python
