"""Build a task's records: a JSONL file and its pictures, whole or not at all.

Everything is written into a temporary folder beside the target and moved at the end, the JSONL file last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.tasks import get_task, task_name
from mirage_ds.tasks.draft import Draft, Picture, Style
from mirage_ds.tasks.maps import Board, map_hash
from mirage_ds.tasks.render import check_renderer
from mirage_ds.tasks.report import Advance, BuildReport, print_report, progress_bar
from mirage_ds.tasks.sources import read_exclude
from mirage_ds.tasks.spec import BuildSpec
from mirage_ds.tasks.supply import Supply

__all__ = ["BuildReport", "BuildSpec", "build", "print_report", "progress_bar"]


def _record(row: dict[str, Any], board: Board, draft: Draft, report: BuildReport, spec: BuildSpec) -> dict[str, Any]:
    """Return the JSON row: the four keys of the format, what the source row had beside them, and what made it."""
    folder = f"images/level_{len(board)}"
    record = {
        "text_input": draft.text_input,
        "text_output": draft.text_output,
        "image_input": f"{folder}/{draft.image.name}.png",
        "image_output": f"{folder}/{draft.helper.name}.png",
        "map_id": int(map_hash(board)[:12], 16),
    }
    record |= {key: value for key, value in row.items() if key not in record or key == "map_id"}
    record |= {"map_desc": board, "level": len(board), "task": report.task, **draft.extra, "seed": spec.seed}
    return record if spec.maps is not None else record | {"split": spec.split}


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`; at the end move its files into `out`, and on an error remove it."""
    work = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        yield work
        # Pictures first: a JSONL file never stands there without them.
        for source in sorted(
            (path for path in work.rglob("*") if path.is_file()), key=lambda path: path.suffix != ".png"
        ):
            target = out / source.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _draw(pictures: dict[str, Picture], folder: Path, progress: Advance | None) -> None:
    """Draw and save pictures under `folder`; compressing them is most of a build and runs on all cores."""
    for parent in {(folder / name).parent for name in pictures}:
        parent.mkdir(parents=True, exist_ok=True)

    def save(name: str) -> None:
        pictures[name].draw().save(folder / name)

    names = list(pictures)
    # The first one alone: it takes the tiles from the real renderer, which is no matter for threads.
    for name in names[:1]:
        save(name)
    pool = ThreadPoolExecutor()
    try:
        for done, _ in enumerate(pool.map(save, names[1:]), 2):
            if progress is not None:
                progress(done, len(pictures))
    finally:
        # Whoever stops the build does not wait for the pictures that nobody began.
        pool.shutdown(cancel_futures=True)


def build(task: str, spec: BuildSpec, progress: Advance | None = None) -> BuildReport:
    """Write `spec.out`/NAME.jsonl and the pictures it names, relative to it, under `spec.out`/images/.

    Args:
        task: a name of `mirage_ds.tasks.TASKS`.
        progress: called with (pictures drawn, pictures in all).

    Raises:
        UserError: an unknown task, a target that exists, gymnasium 1.2.3 missing, a bad file, too few different maps.
    """
    module = get_task(task)
    out = spec.out.resolve()
    target = out / f"{spec.name}.jsonl"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {spec.out} is a file; name a folder")
    if target.exists():
        raise UserError(f"{spec.out / target.name} exists; remove it, or choose another --out or --name")
    check_renderer()
    report = BuildReport(task_name(task), target)
    style = Style(spec.answer, spec.prompt, spec.ties, spec.cell_size)
    supply = Supply(module, spec, style, read_exclude(spec.exclude), report)
    rows = supply.draw() if spec.maps is None else supply.take(spec.maps)
    with _whole_or_nothing(out) as work:
        pictures: dict[str, Picture] = {}
        with (work / target.name).open("w", encoding="utf-8", newline="\n") as file:
            for row, board, draft in rows:
                record = _record(row, board, draft, report, spec)
                pictures |= {record["image_input"]: draft.image, record["image_output"]: draft.helper}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        new = {name: picture for name, picture in pictures.items() if not (out / name).exists()}
        _draw(new, work, progress)
        report.images = len(new)
    report.records = len(rows)
    report.duplicates_kept = spec.maps is not None and not spec.drop_duplicates
    report.levels = dict(Counter(len(board) for _, board, _ in rows))
    report.classes = dict(Counter(draft.kind for _, _, draft in rows))
    return report
