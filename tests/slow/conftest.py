"""Fixtures of the slow suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import make_nano


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with two of its four layers, as on several ranks elsewhere (tests/dist/conftest.py)."""
    return make_nano(tmp_path_factory.mktemp("models") / "nano", layers=2)
