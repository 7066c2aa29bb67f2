"""How long the first batch takes, what memory the input holds, and how long a training process waits for it.

    python -m benchmarks.input --records 1000
    python -m benchmarks.input --records 1000000

Records are generated, with a few hundred distinct small images among them; the features of the images are drawn at
random, as wide as a 3B model's. What a GPU would compute is a pause of --compute_ms a micro-batch: 500 ms is what 8192
tokens of a 3B take, recompute included, at 400 TFLOP/s (8 · 3e9 · 8192 FLOP). Each phase runs in a process of its own,
so that the second one starts as a later run does: the index is there. One JSON line is printed.

F merged features of an image, H hidden width.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

IMAGES, SIDE = 300, 112
H = 2048
WORDS = "the agent goes left right up down and reaches the goal on the frozen lake without a hole"
ROWS_A_STEP, MICRO_BATCH_TOKENS, LATENTS = 64, 8192, 4
MEGABYTE = 1 << 20


def generate(folder: Path, count: int, stage: str) -> Path:
    """Write `count` records of about equal lengths, and their images."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        for kind in ("in", "out"):
            noise = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{kind}{number}.png")
    words = WORDS.split()
    with (folder / "records.jsonl").open("w") as file:
        for number in range(count):
            answer = " ".join(random.choice(words, 20 + int(random.integers(40))))
            row = {
                "text_input": f"<image>Map {number}: which way is the shortest?",
                "text_output": f"<output_image>{answer} \\boxed{{{number % 7}}}",
                "image_input": f"in{random.integers(IMAGES)}.png",
                **({"image_output": f"out{random.integers(IMAGES)}.png"} if stage == "stage1" else {}),
            }
            file.write(json.dumps(row) + "\n")
    return folder / "records.jsonl"


def private_mb(process: Any) -> float:
    """Memory that no other process shares, in MB: Private_Clean + Private_Dirty of smaps_rollup."""
    return round(process.memory_full_info().uss / MEGABYTE, 1)


def make_index(answers: Any, out: Path, records: Path, stage: str) -> None:
    """Phase 1: make the index."""
    index, seconds = _open(out, records, stage)
    answers.put({"index_s": round(seconds, 2), "rows": len(index.row_ids), "tokens_a_row": float(index.tokens.mean())})


def _open(out: Path, records: Path, stage: Any) -> tuple[Any, float]:
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.load import load_encoder
    from mirage_ds.data.make_index import Maker
    from mirage_ds.data.selection import usable

    encoder = load_encoder([str(out / "model")], ImageFinder.beside(records, None), stage, LATENTS)
    begun = time.perf_counter()
    rows = Maker(records, encoder, _kept(stage), out / "cache").index()
    index = usable(rows, records, 4096, 0.1)
    return index, time.perf_counter() - begun


def _kept(stage: str) -> tuple[str, ...]:
    return ("image_input", "image_output") if stage == "stage1" else ("image_input",)


def _features(index: Any, folder: Path) -> dict[str, Any]:
    """Draw the features of every image, or find them drawn."""
    import numpy as np
    import torch

    from mirage_ds.data.features import FeatureStore, KeptFeatures, ShardWriter

    made = {}
    for name, found in index.rows.images.items():
        # Of helpers their targets are kept.
        pooled = np.full(len(found.sizes), LATENTS) if name == "image_output" else found.sizes
        images = found._replace(sizes=pooled)
        store = FeatureStore(folder, {"drawn": name}, H, torch.bfloat16)
        store.add(store.opened(store.listed()))
        kept = KeptFeatures(images, store)
        needed = kept.needs(index.row_ids)
        writer = ShardWriter(store)
        for place in needed[np.flatnonzero(store.missing(images.keys[needed]))]:
            writer.add(images.keys[place], torch.randn(int(images.sizes[place]), H))
        writer.flush()
        store.add(store.opened(writer.written))
        made[name] = kept
    return made


def first_start(answers: Any, out: Path, records: Path, stage: str) -> None:
    """Phase 2: draw the features."""
    _features(_open(out, records, stage)[0], out / "features")
    answers.put({})


def _passes(stage: str, runs: int) -> int:
    """Passes of a micro-step whose deepest row has `runs` latent blocks."""
    return runs * LATENTS + 1 if stage == "stage2" else 1


def train(answers: Any, out: Path, records: Path, stage: Any, steps: int, workers: int, compute_ms: float) -> None:
    """Phase 3: start as a later run does, then take `steps` optimizer steps."""
    import psutil

    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.load import load_encoder
    from mirage_ds.data.loader import Loader
    from mirage_ds.data.pack import Planner

    encoder = load_encoder([str(out / "model")], ImageFinder.beside(records, None), stage, LATENTS)
    process = psutil.Process()
    before = private_mb(process)
    begun, worked = time.perf_counter(), time.process_time()
    index, opened = _open(out, records, stage)
    kept = _features(index, out / "features")
    planner = Planner(index.tokens, index.row_ids, ROWS_A_STEP, 1, MICRO_BATCH_TOKENS, None, 0, index.patches)
    loader = Loader(index.rows, encoder, planner, 0, partial(_passes, stage), workers, kept)
    first = waited = computed = 0.0
    own: list[float] = []
    others: list[float] = []
    for plan, batches in loader.steps(0, steps):
        for _ in range(plan.micro_steps):
            asked = time.perf_counter()
            next(batches)
            took = time.perf_counter() - asked
            if first:
                waited += took
            else:
                first, worked = time.perf_counter() - begun, time.process_time() - worked
            time.sleep(compute_ms / 1000)
            computed += time.perf_counter() - asked - took
        if plan.step in (steps // 10, steps - 1):
            own.append(private_mb(process))
            others.append(max((private_mb(child) for child in process.children()), default=0.0))
    answers.put(
        {
            "open_s": round(opened, 2),
            "first_batch_s": round(first, 2),
            # On a machine that others use too, the time that is this process's own.
            "first_batch_cpu_s": round(worked, 2),
            "private_mb_before": before,
            "private_mb": own,
            "worker_private_mb": others,
            "epochs": round(steps * ROWS_A_STEP / len(index.row_ids), 3),
            "waiting_share": round(waited / (waited + computed), 4),
        }
    )


def _run(function: Any, answers: Any, arguments: tuple[Any, ...]) -> None:
    # A spawned process would spawn its data-loader workers too; a launched one starts them as the platform does.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    function(answers, *arguments)


def in_a_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """Run a phase in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_run, args=(function, answers, arguments))
    process.start()
    while True:
        try:
            found: dict[str, Any] = answers.get(timeout=1)
            break
        except multiprocessing.queues.Empty:
            if not process.is_alive():
                raise RuntimeError(f"{function.__name__} ended with {process.exitcode}") from None
    process.join()
    return found


@click.command()
@click.option("--records", "count", default=1000, show_default=True)
@click.option("--stage", default="sft", show_default=True, type=click.Choice(["sft", "stage1", "stage2"]))
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of 64 rows.")
@click.option("--workers", default=2, show_default=True)
@click.option("--compute_ms", default=500.0, show_default=True, help="Pause that stands for a micro-batch's compute.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to work in; a temporary one if not set.")
def main(count: int, stage: str, steps: int, workers: int, compute_ms: float, out: Path | None) -> None:
    """Print one JSON line."""
    from mirage_ds.model.init import init_model

    place = out or Path(tempfile.mkdtemp(prefix="mirage-input-"))
    try:
        records = place / "data/records.jsonl"
        if not records.exists():
            generate(place / "data", count, stage)
            sample = Path(__file__).parents[1] / "data/sample.jsonl"
            init_model("nano", place / "model", texts=[sample], config_only=True)
        line: dict[str, Any] = {"records": count, "stage": stage, "workers": workers, "compute_ms": compute_ms}
        line |= in_a_process(make_index, place, records, stage)
        in_a_process(first_start, place, records, stage)
        line |= in_a_process(train, place, records, stage, steps, workers, compute_ms)
        index = next((place / "cache/index").iterdir())
        line["index_mb"] = round(sum(file.stat().st_size for file in index.iterdir()) / MEGABYTE, 1)
        print(json.dumps(line))
    finally:
        if out is None:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
