"""Memory of a start and of its steps does not grow with the size of the pictures, nor with their number."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from support.records import write_jsonl

pytestmark = pytest.mark.slow

MEGABYTE = 1 << 20
PHOTOGRAPHS = 200
# So many different files; the others are links to them. Features are kept by content, so each of these is decoded once,
# and the records, the index and the rows are of 200 photographs.
DIFFERENT = 16


def photographs(folder: Path, size: tuple[int, int], count: int, different: int) -> Path:
    """Write records of photographs, of which some are links to others."""
    folder.mkdir()
    Image.effect_noise((size[0] // 8, size[1] // 8), 60).resize(size).convert("RGB").save(folder / "0.jpg", quality=80)
    content = (folder / "0.jpg").read_bytes()
    for number in range(1, count):
        place = folder / f"{number}.jpg"
        if number < different:
            # Bytes behind the picture make it another file.
            place.write_bytes(content + number.to_bytes(4))
        else:
            place.symlink_to(f"{number % different}.jpg")
    rows = [{"text_input": "What?", "text_output": "A.", "image_input": f"{number}.jpg"} for number in range(count)]
    return write_jsonl(folder / "rows.jsonl", rows)


def held(process: psutil.Process) -> tuple[float, float]:
    """Return MB that a process and its descendants hold: of their own, and in /dev/shm."""
    own = 0
    shared: dict[int, int] = {}
    for one in [process, *process.children(recursive=True)]:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{one.pid}/status").read_text().splitlines())
            own += 1024 * sum(int(status.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem"))
            for descriptor in Path(f"/proc/{one.pid}/fd").iterdir():
                if os.readlink(descriptor).startswith("/dev/shm/"):
                    found = descriptor.stat()
                    shared[found.st_ino] = 512 * found.st_blocks
        except OSError:
            # It has ended, or closed what was looked at.
            continue
    return own / MEGABYTE, sum(shared.values()) / MEGABYTE


@contextmanager
def watched(pid: int) -> Iterator[list[tuple[float, float]]]:
    """Note what a process holds, many times a second."""
    seen: list[tuple[float, float]] = []
    ended = threading.Event()

    def look() -> None:
        process = psutil.Process(pid)
        while not ended.wait(0.05):
            try:
                seen.append(held(process))
            except psutil.NoSuchProcess:
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def peak_of_a_run(nano: Path, rows: Path, out: Path) -> float:
    """Train on all rows; MB that its processes and shared memory held together at most."""
    settings = dict(
        stage="sft", model=nano, data_path=rows, save_model_path=out, max_pixels=50_176, global_batch_size=100,
        micro_batch_tokens=2048, max_length=1024, max_steps=2, warmup_steps=0, num_workers=2,
        cache_dir=rows.parent / "cache", report_to="none",
    )  # fmt: skip
    command = [sys.executable, "-m", "mirage_ds.train"]
    command += [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    with (rows.parent / "log.txt").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        with watched(running.pid) as seen:
            assert running.wait() == 0, (rows.parent / "log.txt").read_text()[-2000:]
    assert len(list((rows.parent / "cache/features").rglob("*.safetensors"))) > 0
    return max(own + shared for own, shared in seen)


def test_a_run_on_200_photographs_holds_what_one_on_small_pictures_does(nano: Path, tmp_path: Path) -> None:
    peaks = {}
    for name, size in (("small", (1000, 750)), ("large", (4000, 3000))):
        rows = photographs(tmp_path / name, size, PHOTOGRAPHS, DIFFERENT)
        peaks[name] = peak_of_a_run(nano, rows, tmp_path / f"{name} run")
    print(peaks)
    # A worker holds one decoded photograph at a time: 36 MB more, and as much again while Pillow reads it.
    assert peaks["large"] < peaks["small"] + 2 * 2 * 36


def _encode(answers: Any, nano: Path, rows: Path, max_pixels: int | None, workers: int) -> None:
    """Keep the features of all rows, by a tower that looks at nothing."""
    from support.indices import selected

    from mirage_ds.config.run import RunConfig
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.load import load_encoder
    from mirage_ds.engine.setup import World
    from mirage_ds.engine.waiting import Waiting
    from mirage_ds.model.load import load_tower, read_config
    from mirage_ds.model.vision import FrozenTower
    from mirage_ds.run import features as keep_features
    from mirage_ds.run.settings import Run

    # As in a run; a process that was spawned would spawn the workers too.
    multiprocessing.set_start_method("fork", force=True)

    class Blind(FrozenTower):
        def features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
            # Slower than its workers: what they have made piles up as far as it may.
            time.sleep(pixel_values.nbytes / 1e8)
            return torch.zeros(int(grid_thw.prod(-1).sum()) // 4, self.width)

    encoder = load_encoder([str(nano)], ImageFinder.beside(rows, None), "sft", 1, (None, max_pixels))
    tower = Blind(load_tower(nano, read_config(nano), torch.float32, torch.device("cpu")).tower)
    index = selected(rows, encoder, 20_000, 0.0, ("image_input",), cache_dir=rows.parent / "cache")
    images = index.rows.images["image_input"]
    kept = keep_features._kept(rows.parent / "features", tower, "print", encoder, "image_input", images)
    own = keep_features.Images(index.rows, encoder, "image_input", images, tower)
    places = kept.needs(index.row_ids)
    config = RunConfig(model="m", save_model_path="s", stage="sft", data_path=rows, num_workers=workers)
    world = World(0, 1, 0, torch.device("cpu"), Waiting(None, 0, 1, 60.0))
    shards, broken = keep_features._make(Run(config, world, asked=lambda: False), tower, kept, own, places)
    made = sum(len(shard.table) for shard in kept.store.opened(shards))
    answers.put((made, len(broken), max(own.bytes_of_pixels(places)) / MEGABYTE))


# At 3.2 M pixels a photograph has 73 MB of them in float32, at the public processor's limit 288.
@pytest.mark.parametrize(("max_pixels", "count", "workers"), [(3_211_264, 20, 4), (12_845_056, 8, 4)])
def test_pixels_in_flight_are_bounded(max_pixels: int, count: int, workers: int, nano: Path, tmp_path: Path) -> None:
    rows = photographs(tmp_path / "photographs", (4000, 3000), count, count)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    running = context.Process(target=_encode, args=(answers, nano, rows, max_pixels, workers))
    running.start()
    with watched(running.pid) as seen:
        made, broken, largest = answers.get(timeout=120)
        running.join()
    assert (made, broken) == (count, 0)
    peak = max(shared for _, shared in seen)
    print(f"{largest:.0f} MB each, {peak:.0f} MB in shared memory, {max(own for own, _ in seen):.0f} MB of their own")
    # 1 GiB, not the constant itself, which could be anything. Beside what lies ready, one chunk goes to the tower.
    assert 0 < peak <= 1024 + largest
