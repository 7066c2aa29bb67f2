"""Under Slurm a time limit, a preemption and a dead host end in a requeued job with an undisturbed one's losses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from .hosts import Cluster, Host, wait_until
from .jobs import GUARD, LIMIT_S, Job, flags
from .slurm import Slurm

# The learning rate is constant: a shorter run begins as the longer one does.
STEPS, SHORT = 16, 10
REQUEUED_S = 240


def start(
    slurm: Slurm,
    out: Path,
    model: Path,
    data: Path,
    features: Path,
    *options: str,
    steps: int = STEPS,
    pace: str | None = None,
) -> Job:
    """Submit a training run on both nodes, all their CPUs."""
    settings = flags(
        model=model,
        stage="sft",
        data_path=data,
        max_steps=steps,
        epochs=1000,
        save_model_path=out / "model",
        global_batch_size=4,
        save_every=2,
        learning_rate=1e-3,
        lr_scheduler="constant",
        num_workers=0,
        report_to="none",
        feature_dir=features,
        cache_dir=features / "cache",
    )
    shape = ("--exclusive", "--requeue", *options)
    return Job(
        "sbatch",
        slurm.nodes[:2],
        1,
        out,
        [*settings, "--log_rows", *([pace] if pace else [])],
        module="tests.cluster.faulty" if pace else "mirage_ds.train",
        login=slurm.login,
        guard=GUARD,
        options=shape,
    )


def lines(out: Path) -> list[dict[str, object]]:
    """Return the whole lines of the run's log."""
    log = out / "model/run/log.jsonl"
    text = log.read_text() if log.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(out: Path) -> list[tuple[object, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"], tuple(line["row_ids"])) for line in lines(out)]  # type: ignore[arg-type]


def wait_for_step(job: Job, step: int) -> None:
    wait_until(lambda: len(lines(job.out)) >= step, f"step {step}; it said {job.said()}", REQUEUED_S)


def lose(host: Host, job: Job) -> dict[str, float]:
    """Let a host lose its power, and come back once the job has ended; seconds from the loss until each event."""
    begun, met = time.time(), {}
    host.power_off()
    for name, words in (("ended", "attempt 0 ended"), ("started again", "attempt 1 on ")):
        wait_until(lambda words=words: words in job.said(), f"{words}; it said {job.said()}", REQUEUED_S)
        met[name] = time.time() - begun
        if name == "ended":
            host.power_on()
    again = time.time()
    wait_until(lambda: any(float(str(line["time"])) > again for line in lines(job.out)), "a step", REQUEUED_S)
    verdict = json.loads((job.out / "model/run/faults.jsonl").read_text().splitlines()[-1])
    assert "no sign of life" in str(verdict)
    return {"found": verdict["time"] - begun, **met, "first step": time.time() - begun}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requeue")


@pytest.fixture(scope="module")
def undisturbed(nano: Path, mixed: Path, slurm: Slurm, shared: Path) -> list[tuple[object, ...]]:
    job = start(slurm, shared / "undisturbed", nano, mixed, shared / "features")
    assert job.end(REQUEUED_S) == 0, job.said()
    assert len(curve(job.out)) == STEPS
    return curve(job.out)


@pytest.mark.parametrize("cause", ["time limit", "preemption", "dead host"])
def test_a_requeued_job_goes_on(
    cause: str,
    undisturbed: list[tuple[object, ...]],
    nano: Path,
    mixed: Path,
    cluster: Cluster,
    slurm: Slurm,
    shared: Path,
    tmp_path: Path,
) -> None:
    # Slurm looks at time limits twice a minute: the signal comes 78 to 108 s after the start. Even a busy machine has
    # taken a step by then, and at that pace the run has more to do.
    limit = ("--time=2", "--signal=B:USR1@12") if cause == "time limit" else ()
    steps = STEPS if limit else SHORT
    job = start(
        slurm,
        tmp_path / "out",
        nano,
        mixed,
        shared / "features",
        *limit,
        steps=steps,
        pace="crawl" if limit else "walk",
    )
    if cause == "preemption":
        wait_for_step(job, 5)
        other = ["sbatch", "--partition=high", "--exclusive", "-N2", "--output=/dev/null", "--wrap", "srun sleep 2"]
        slurm.login.run(other, cwd=tmp_path)
    if cause == "dead host":
        wait_for_step(job, 5)
        met = lose(slurm.nodes[1], job)
        print("seconds from the loss of a host until: " + ", ".join(f"{one} {met[one]:.1f}" for one in met))
        assert met["ended"] < LIMIT_S
    assert job.end(REQUEUED_S) == 0, job.said()
    attempts = [line for line in job.said().splitlines() if line.startswith("attempt ") and " on node" in line]
    assert len(attempts) >= 2
    assert "continuing from" in job.said()
    assert curve(job.out) == undisturbed[:steps]
    if cause != "dead host":
        assert "stopped on request after step" in job.said()
    assert not job.left_behind()
