"""Each launcher's script trains on several hosts with the losses of one host."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from .hosts import Cluster, Host
from .jobs import GUARD, Job, flags
from .slurm import Slurm


@pytest.fixture(scope="module")
def cluster(can_have_hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One host more than elsewhere: under Slurm the first one runs no jobs."""
    with Cluster(count=4, folder=tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


Steps = list[tuple[float, float]]


@pytest.fixture(scope="module")
def losses(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Steps]:
    """Train nano for three steps with a launcher and return the losses and gradient norms."""
    folder = tmp_path_factory.mktemp("runs")

    def train(launcher: str, hosts: list[Host], slots: int, login: Host) -> Steps:
        out = folder / f"{launcher}-{len(hosts)}x{slots}"
        settings = flags(
            model=nano,
            stage="stage2",
            latent_size=2,
            data_path=mixed,
            max_steps=3,
            save_model_path=out / "model",
            global_batch_size=6,
            micro_batch_size=2,
            learning_rate=1e-3,
            warmup_steps=0,
            num_workers=0,
            report_to="none",
            feature_dir=folder / "features",
            cache_dir=folder / "cache",
        )
        # Nobody is lost here: on two busy cores four ranks import for more than the other tests' 25 s.
        guard = f"{GUARD} --start 120"
        job = Job(launcher, hosts, slots, out, settings, module="mirage_ds.train", login=login, guard=guard)
        assert job.end(240) == 0, job.said()[-5000:]
        assert not job.left_behind()
        lines = [json.loads(line) for line in (out / "model/run/log.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines]

    return train


@pytest.fixture(scope="module")
def alone(losses: Callable[..., Steps], slurm: Slurm) -> Callable[[int], Steps]:
    """The losses of so many ranks on one host."""
    return cache(lambda ranks: losses("local", slurm.nodes[:1], ranks, slurm.login))


@pytest.mark.parametrize(
    ("count", "slots", "launcher"),
    [
        (2, 1, "pdsh"),
        (2, 1, "pods"),
        (2, 1, "sbatch"),
        # What ranks of a shape are given is the same under each launcher: test_launch.py.
        (2, 2, "slurm"),
        (3, 1, "mpi"),
    ],
)
def test_a_launcher_trains_as_one_host_does(
    count: int,
    slots: int,
    launcher: str,
    alone: Callable[[int], Steps],
    losses: Callable[..., Steps],
    slurm: Slurm,
) -> None:
    assert len(alone(count * slots)) == 3
    assert losses(launcher, slurm.nodes[:count], slots, slurm.login) == alone(count * slots)
