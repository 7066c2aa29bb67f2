"""Fixtures: three hosts, and Slurm on them, for the tests of a file; whole again after each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import make_nano

from . import namespaces
from .hosts import LOGIN_PATH, Cluster
from .slurm import Slurm

COMMANDS = ("ip", "ssh", "ssh-keygen", "sshd", "pdsh", "mpirun", "munged", "slurmctld", "slurmd", "srun", "sbatch")


def missing_parts() -> list[str]:
    """Return what a cluster needs and this machine, or this user, has not."""
    parts = [command for command in COMMANDS if not shutil.which(command, path=LOGIN_PATH)]
    try:
        os.close(namespaces.new_network())
    except OSError:
        parts.insert(0, "the right to make namespaces")
    return parts


def require_hosts() -> None:
    """Skip where hosts cannot be made; on CI, fail."""
    if parts := missing_parts():
        sentence = "tests/cluster needs root on Linux and the packages in tests/cluster/packages.txt; missing: "
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(sentence + ", ".join(parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the file that waits for Slurm's time limit, since others compute meanwhile, then the longest."""
    first = ("requeue", "training", "failures", "doctor", "lost_hosts", "trainer_failures", "studies")
    places = {f"test_{name}.py": place for place, name in enumerate(first)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def can_have_hosts() -> None:
    require_hosts()


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model with two of its four layers, as on several ranks elsewhere (tests/dist/conftest.py)."""
    return make_nano(tmp_path_factory.mktemp("models") / "nano", layers=2)


@pytest.fixture(scope="module")
def cluster(can_have_hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """node1, node2 and node3."""
    with Cluster(count=3, folder=tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slurm(cluster: Cluster) -> Iterator[Slurm]:
    """Slurm: node1 is the login host, node2 and node3 have two CPUs each."""
    with Slurm(cluster) as slurm:
        yield slurm


@pytest.fixture(autouse=True)
def _repair(request: pytest.FixtureRequest) -> Iterator[None]:
    """What one test has broken or left running is no other test's trouble."""
    yield
    for name in ("cluster", "slurm"):
        if name in request.fixturenames:
            request.getfixturevalue(name).repair()
