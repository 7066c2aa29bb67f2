"""From a model folder and a records file to the whole report."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.analysis.controls.bench import Bench
from mirage_ds.analysis.controls.names import PATH
from mirage_ds.analysis.controls.paths import run_paths
from mirage_ds.analysis.controls.report import summarize
from mirage_ds.analysis.controls.run import Track, run_conditions
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, need_latents
from mirage_ds.evaluate.scoring import Answer, marks, task_of
from mirage_ds.model.generate import Limits, latent_tokens


class Wanted(NamedTuple):
    """What is asked.

    Attributes:
        names: conditions, as conditions.parse_names gives them.
        task: whose scorer; the records' own if None.
        most: take only the first so many records.
        helper_pixels: (min, max) pixels of helper images; None keeps the processor's own.
    """

    names: list[str]
    task: str | None = None
    most: int | None = None
    seed: int = 42
    batch_size: int = 32
    helper_pixels: tuple[int | None, int | None] = (None, None)


def study(
    decoder: Decoder, file: Path, processor: Path | None, limits: Limits, wanted: Wanted, track: Track = iter
) -> dict[str, Any]:
    """Run all conditions on a records file.

    Args:
        processor: folder that gives the image processor where the model's own has none.
        limits: with a fixed_run, the slots of every run.

    Returns:
        {"task", "model", "data", "settings", "hashes", "conditions", "answers", "path"}; the last ones where asked for.

    Raises:
        UserError: an open run length, a fault in a record, or a condition that cannot be made of these records.
    """
    need_latents(decoder)
    k = limits.fixed_run
    if not k:
        raise UserError(
            f"--run_length: conditions are compared at the same number of slots, at least 1, and {decoder.folder} does "
            "not say how many it was trained with; give the number"
        )
    records, faults = scan(file)
    if faults:
        raise UserError(f"{file}: {faults[0]}; `mirage-ds data check {file}` lists all faults")
    records = records[: wanted.most]
    task = task_of(records, file, wanted.task)
    # What the scorer lacks in a record is said now, before anything is decoded.
    marks(records, [Answer("", [], [])] * len(records), task)
    folders = [str(decoder.folder)] + ([str(processor)] if processor else [])
    images: Any = decoder.encoder.images
    pixels = images.size["shortest_edge"], images.size["longest_edge"]
    compress = decoder.trained.get("compress_strategy", "average")
    finder = decoder.encoder.finder
    helpers = load_encoder(folders, finder, "stage1", k, pixels, wanted.helper_pixels, compress=compress)
    assert decoder.loaded.tower is not None
    bench = Bench(
        decoder.loaded.model,
        decoder.loaded.tower,
        helpers if "oracle" in wanted.names else replace(helpers, stage="stage2"),
        latent_tokens(decoder.encoder),
        limits,
    )
    report: dict[str, Any] = {
        "task": task,
        "model": str(decoder.folder),
        "data": str(file),
        "settings": {
            "latents": wanted.names,
            "slots": k,
            "decoding": "greedy",
            "max_new_tokens": limits.new_tokens,
            "seed": wanted.seed,
            "batch_size": wanted.batch_size,
            "min_pixels": pixels[0],
            "max_pixels": pixels[1],
            "device": bench.device.type,
            "dtype": str(bench.model.head.weight.dtype).removeprefix("torch."),
        },
        "hashes": {"data": hashlib.sha256(file.read_bytes()).hexdigest()},
    }
    if PATH in wanted.names:
        # First, since it refuses soonest.
        grounded = replace(bench, encoder=helpers)
        report["path"] = run_paths(grounded, records, task, wanted.seed, wanted.batch_size, track)
    names = [name for name in wanted.names if name != PATH]
    if names:
        outcomes = run_conditions(bench, records, names, wanted.seed, wanted.batch_size, track)
        report["conditions"], report["answers"] = summarize(records, outcomes, task, wanted.seed)
    return report
