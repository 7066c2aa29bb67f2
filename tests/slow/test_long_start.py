"""A start whose records take long, as two real ranks without a launcher: past DeepSpeed's bound, killed, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mirage_ds.cluster.here import free_ports
from mirage_ds.config.run import RunConfig
from mirage_ds.run.records import index_beforehand

LIMIT_S = 240
# `mirage_ds.train`, which takes longer for each piece of the records. DeepSpeed's bound is shorter than the minute that
# its variable DEEPSPEED_TIMEOUT could make it.
SLOW = """
import os, time
from datetime import timedelta
import torch.distributed
begin, bound = torch.distributed.init_process_group, timedelta(seconds=float(os.environ["BOUND_SECONDS"]))
torch.distributed.init_process_group = lambda *given, **more: begin(*given, **more | {"timeout": bound})
from mirage_ds.data import sources
from mirage_ds.data.index_part import Parts
sources.PIECE_BYTES = 100
encode, seconds = Parts.encode, float(os.environ["PIECE_SECONDS"])
def slow(*given):
    time.sleep(seconds)
    return encode(*given)
Parts.encode = slow
from mirage_ds.train import main
main()
"""


class Job:
    """Two ranks of a run."""

    def __init__(
        self, cache: Path, out: Path, nano: Path, mixed: Path, seconds: tuple[float, float], bound: float = 600
    ):
        self.cache = cache
        settings = dict(model=nano, data_path=mixed, save_model_path=out, cache_dir=cache, stage="sft", max_steps=1)
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_ports()), BOUND_SECONDS=str(bound))
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", SLOW, *words, "--global_batch_size", "2", "--num_workers", "0"],
                env=os.environ
                | place
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PIECE_SECONDS": str(seconds[rank])},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in (0, 1)
        ]

    def times(self, names: set[str]) -> dict[str, int]:
        return {
            file.name: file.stat().st_mtime_ns for file in self.cache.glob("index/.*.parts/*") if file.name in names
        }

    def parts(self) -> set[str]:
        return {file.name for file in self.cache.glob("index/.*.parts/[0-9]*")}

    def wait_for_parts(self, count: int) -> None:
        end = time.monotonic() + LIMIT_S
        while len(self.parts()) < count:
            assert time.monotonic() < end
            assert all(rank.poll() is None for rank in self.ranks)
            time.sleep(0.02)

    def end(self) -> tuple[list[int], str]:
        said = [rank.communicate(timeout=LIMIT_S)[0] for rank in self.ranks]
        return [rank.returncode for rank in self.ranks], "".join(said)


@pytest.mark.slow
def test_records_may_take_longer_than_deepspeeds_bound(nano: Path, mixed: Path, tmp_path: Path) -> None:
    # Rank 1 has six pieces of the twelve, 36 s in all; rank 0 waits for it longer than the bound.
    codes, said = Job(tmp_path / "cache", tmp_path / "out", nano, mixed, (0.0, 6.0), bound=25).end()
    assert codes == [0, 0], said
    assert "model saved" in said


@pytest.mark.slow
def test_a_start_that_is_killed_and_stopped_goes_on(
    nano: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    # Forty-eight pieces: workers have some of them before them when they end.
    many = mixed.with_name("many.jsonl")
    many.write_text(4 * mixed.read_text())
    killed = Job(cache, out, nano, many, (0.5, 0.5))
    killed.wait_for_parts(3)
    for rank in killed.ranks:
        rank.kill()
    killed.end()
    made = killed.parts()
    times = killed.times(made)
    assert 3 <= len(made) < 30
    assert not out.exists()

    asked = Job(cache, out, nano, many, (0.5, 0.5))
    asked.wait_for_parts(len(made) + 2)
    asked.ranks[1].send_signal(signal.SIGUSR1)
    codes, said = asked.end()
    assert codes == [75, 75], said
    assert made < asked.parts() < set(map(str, range(48)))
    # What the killed start had made was not made again.
    assert asked.times(made) == times
    assert not out.exists()

    codes, said = Job(cache, out, nano, many, (0.0, 0.0)).end()
    assert codes == [0, 0], said
    monkeypatch.setattr("mirage_ds.data.sources.PIECE_BYTES", 100)
    values = dict(model=str(nano), data_path=many, save_model_path=out, cache_dir=tmp_path / "one", stage="sft")
    [_] = index_beforehand(RunConfig.model_validate(values))
    (wanted,), (found,) = ([*(folder / "index").iterdir()] for folder in (tmp_path / "one", cache))
    assert found.name == wanted.name
    for file in wanted.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()
