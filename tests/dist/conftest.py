"""Fixtures of the tests on several ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.group import Group, template
from support.models import make_nano, untie

# Of one rank: engines that were not destroyed, compiled code, caches. DeepSpeed collects garbage in every step.
MOST_BYTES = 3 << 29


def pytest_collection_finish(session: pytest.Session) -> None:
    """Copy this process for the ranks, before a test runs in it."""
    if not session.config.option.collectonly and any(
        Path(__file__).parent in item.path.parents for item in session.items
    ):
        template()


@pytest.fixture(scope="session")
def shared_group() -> Iterator[Group]:
    made = Group()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def group(shared_group: Group) -> Iterator[Group]:
    """Two ranks for the tests of a worker: a first engine costs each a second. What tests leave in them is bounded."""
    yield shared_group
    if shared_group.memory() > MOST_BYTES:
        shared_group.stop()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Group]:
    """A group of one for the tests of a worker."""
    made = Group(1)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def own_group() -> Iterator[Group]:
    """Two ranks for the tests of one file alone, which need a group before its first step or leave it broken."""
    made = Group()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with two of its four layers: ranks spend most of their time in DeepSpeed's hooks around each."""
    return make_nano(tmp_path_factory.mktemp("models") / "nano", layers=2)


@pytest.fixture(scope="session")
def untied(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano with an output matrix of its own."""
    return untie(nano, tmp_path_factory.mktemp("models") / "untied")


@pytest.fixture(scope="session")
def helped(mixed: Path) -> Path:
    """The rows of `mixed` that stage1 can use."""
    rows = [line for line in mixed.read_text().splitlines() if "image_output" in json.loads(line)]
    path = mixed.parent / "helped.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path
