"""Fixtures of the slow suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import make_nano

# Longest first, by their seconds on two cores: a worker takes a file while it is still at the one before, so that the
# last files have to be short.
LONGEST = (
    *("first_day", "ablate", "chaos", "public_harnesses", "gpu_script", "rl_study", "stop", "offloaded", "first_hour"),
    *("published_ranks", "wheel", "public_commands", "long_start", "scaffold_command", "world_size", "errors"),
    *("photographs", "evaluation", "serve_load", "planned", "notebook"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with two of its four layers, as on several ranks elsewhere (tests/dist/conftest.py)."""
    return make_nano(tmp_path_factory.mktemp("models") / "nano", layers=2)
