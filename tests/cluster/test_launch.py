"""Each launcher's script on several hosts: ranks where they belong, flags and environment as given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .hosts import Cluster
from .jobs import LAUNCHERS, Job
from .slurm import Slurm

# Hosts × ranks a host.
SHAPES = ((2, 1), (2, 2), (3, 1))
# A shell, pdsh or a launcher on the way would change every one of these.
WORD = "it's \"a\" $HOME `id` %h\\n --x=1 'z' *"
VARIABLE = "a \"b\" $HOME  %h'c'"


@pytest.fixture(scope="module")
def cluster(can_have_hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One host more than elsewhere: under Slurm the first one runs no jobs."""
    with Cluster(count=4, folder=tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_ranks_flags_and_environment_arrive(shape: tuple[int, int], slurm: Slurm, tmp_path: Path) -> None:
    hosts, slots = slurm.nodes[: shape[0]], shape[1]
    arguments = ("--steps", 3, "--word", WORD)
    jobs = [
        Job(
            *(launcher, hosts, slots, tmp_path / launcher, ("--out", tmp_path / launcher, *arguments)),
            login=slurm.login,
            NCCL_MARK=VARIABLE,
        )
        for launcher in (*LAUNCHERS, "sbatch")
    ]
    for job in jobs:
        assert job.end() == 0, f"{job.launcher}: {job.said()}"
        given = job.given()
        places = [(one["host"], one["environment"]["LOCAL_RANK"]) for one in given]
        assert places == [(host.name, str(number)) for host in hosts for number in range(slots)], job.launcher
        assert [one["word"] for one in given] == [WORD] * len(given), job.launcher
        for one in given:
            environment = one["environment"]
            assert environment["NCCL_MARK"] == VARIABLE, job.launcher
            assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("1", "cpu"), job.launcher
            assert environment["WORLD_SIZE"] == str(len(given))
        assert sorted(file.name for file in (job.out / "logs").rglob("rank*.log")) == [
            f"rank{number}.log" for number in range(len(given))
        ], job.launcher
