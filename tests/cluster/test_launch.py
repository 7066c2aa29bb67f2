"""Each launcher's script on several hosts: ranks where they belong, flags and environment as given, the same losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .hosts import Cluster, Host
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


@pytest.fixture(scope="module")
def losses(nano: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Train nano for three steps with a launcher and return the losses and gradient norms."""
    folder = tmp_path_factory.mktemp("runs")

    def train(launcher: str, hosts: list[Host], slots: int, login: Host) -> list[tuple[float, float]]:
        out = folder / f"{launcher}-{len(hosts)}x{slots}"
        flags = (
            *("--model", nano, "--stage", "stage2", "--latent_size", 2, "--data_path", mixed, "--max_steps", 3),
            *("--save_model_path", out / "model", "--global_batch_size", 6, "--micro_batch_size", 2),
            *("--learning_rate", 1e-3, "--warmup_steps", 0, "--num_workers", 0, "--report_to", "none"),
            *("--feature_dir", folder / "features", "--cache_dir", folder / "cache"),
        )
        job = Job(launcher, hosts, slots, out, flags, module="mirage_ds.train", login=login)
        assert job.end(120) == 0, job.said()[-5000:]
        assert not job.left_behind()
        lines = [json.loads(line) for line in (out / "model/run/log.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines]

    return train


@pytest.mark.parametrize(
    "shape",
    [(2, 1), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 2), (3, 1)))],
    ids=lambda shape: f"{shape[0]}x{shape[1]}",
)
def test_every_launcher_trains_as_one_host_does(
    shape: tuple[int, int], losses: Callable[..., list[float]], slurm: Slurm
) -> None:
    count, slots = shape
    alone = losses("local", slurm.nodes[:1], count * slots, slurm.login)
    assert len(alone) == 3
    for launcher in (*LAUNCHERS, *(["sbatch"] if shape == (2, 1) else [])):
        assert losses(launcher, slurm.nodes[:count], slots, slurm.login) == alone, launcher
