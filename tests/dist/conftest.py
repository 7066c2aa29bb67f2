"""Fixtures of the tests on several ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.group import Group


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """Two ranks for the tests of one file."""
    made = Group()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def helped(mixed: Path) -> Path:
    """The rows of `mixed` that stage1 can use."""
    rows = [line for line in mixed.read_text().splitlines() if "image_output" in json.loads(line)]
    path = mixed.parent / "helped.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path
