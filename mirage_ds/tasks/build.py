"""Write a task's records: a JSONL file and its pictures, whole or not at all.

Everything is written into a temporary folder beside the target and moved at the end, the JSONL file last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError, shown
from mirage_ds.tasks import get_task, task_name
from mirage_ds.tasks.draft import INPUT_IMAGE, OUTPUT_IMAGE, Draft, Picture
from mirage_ds.tasks.report import Advance, BuildReport, print_report, progress_bar
from mirage_ds.tasks.spec import BuildSpec
from mirage_ds.tasks.task import Settings, Task

__all__ = ["BuildReport", "BuildSpec", "build", "convert", "print_report", "progress_bar"]

# So many records' pictures are held at a time.
_CHUNK = 64


def build(task: str, settings: Settings, progress: Advance | None = None) -> BuildReport:
    """Write `settings.out`/NAME.jsonl and the pictures it names, relative to it, under `settings.out`/images/.

    Args:
        task: a name of `mirage_ds.tasks.TASKS`, or package.module:Name.
        settings: of the task's `build_settings`.
        progress: called with (pictures written, pictures in all).

    Raises:
        UserError: an unknown task, a target that exists, what the task itself says.
    """
    made, report = _begin(task, settings)
    return _write(made, made.build(settings, report), settings, report, progress)


def convert(task: str, source: Path, settings: Settings, progress: Advance | None = None) -> BuildReport:
    """Write the records of a file or folder in another form; as `build`, with the task's `convert_settings`."""
    made, report = _begin(task, settings)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check the path")
    return _write(made, made.convert(source, settings, report), settings, report, progress)


def _begin(task: str, settings: Settings) -> tuple[Task, BuildReport]:
    made = get_task(task)
    target = settings.out.resolve() / f"{settings.name}.jsonl"
    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"--out {settings.out} is a file; name a folder")
    if target.exists():
        raise UserError(f"{settings.out / target.name} exists; remove it, or choose another --out or --name")
    return made, BuildReport(task_name(task), target)


def _write(
    task: Task, drafts: Iterable[Draft], settings: Settings, report: BuildReport, progress: Advance | None
) -> BuildReport:
    out = settings.out.resolve()
    total = None
    if isinstance(drafts, Sequence):
        total = len({name for draft in drafts for name in _pictures(draft) if not (out / name).exists()})
    with _whole_or_nothing(out) as work, _Painter(work, total, progress) as painter:
        with (work / report.file.name).open("w", encoding="utf-8", newline="\n") as file:
            waiting = iter(drafts)
            while chunk := list(islice(waiting, _CHUNK)):
                pictures: dict[str, Picture] = {}
                for draft in chunk:
                    record = _record(task, draft, settings, report.task)
                    pictures |= _pictures(draft)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    _count(draft, report)
                painter.write({name: one for name, one in pictures.items() if not (out / name).exists()})
        if not report.records:
            raise UserError(f"task {report.task} has made no record; {_why(report)}")
        report.images = painter.written
    return report


def _why(report: BuildReport) -> str:
    lost = {**report.notes, "excluded": report.excluded}
    told = ", ".join(f"{what}: {count}" for what, count in lost.items() if count)
    return f"what was left out: {told}; change the settings" if told else "there was nothing to make one of"


def _pictures(draft: Draft) -> dict[str, Picture]:
    """Return a draft's pictures by their path beside the JSONL file."""
    return {f"images/{picture.name}": picture for picture in (*draft.images, *draft.helpers)}


def _record(task: Task, draft: Draft, settings: Settings, name: str) -> dict[str, Any]:
    """Return the JSON row, and refuse one whose marks or whose own answer do not fit.

    Raises:
        UserError: the task's question or answer is not right; the trainer or the scorer would say so much later.
    """
    row: dict[str, Any] = {}
    for key, pictures in (("image_input", draft.images), ("image_output", draft.helpers)):
        paths = [f"images/{picture.name}" for picture in pictures]
        if paths:
            row[key] = paths if len(paths) > 1 else paths[0]
    row |= draft.extra
    row.setdefault("task", name)
    record = {"text_input": task.prompt(row, settings), "text_output": draft.text_output, **row}
    # As the format has it: input images, or one helper, need no marks, and latents need no helper.
    checks = [("text_input", INPUT_IMAGE, len(draft.images), True)]
    if draft.helpers:
        checks.append(("text_output", OUTPUT_IMAGE, len(draft.helpers), len(draft.helpers) == 1))
    for key, mark, images, unmarked in checks:
        found = record[key].count(mark)
        if found != images and not (found == 0 and unmarked):
            raise UserError(
                f"task {name} makes {found} image mark(s) for {images} image(s) in {key} {shown(record[key])}; "
                "write one mark for each image"
            )
    if draft.text_output and task.parse(draft.text_output, record) is None:
        raise UserError(f"task {name} reads no answer out of its own {shown(draft.text_output)}; mend build or parse")
    return record


def _count(draft: Draft, report: BuildReport) -> None:
    report.records += 1
    if (level := draft.extra.get("level")) is not None:
        report.levels[level] = report.levels.get(level, 0) + 1
    if draft.kind:
        report.classes[draft.kind] = report.classes.get(draft.kind, 0) + 1


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`; at the end move its files into `out`, and on an error remove it."""
    work = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        yield work
        # Pictures first: a JSONL file never stands there without them.
        files = [path for path in work.rglob("*") if path.is_file()]
        for source in sorted(files, key=lambda path: path.suffix == ".jsonl"):
            target = out / source.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Painter:
    """Writes pictures under a folder, each once; compressing them is most of a build and runs on all cores."""

    def __init__(self, folder: Path, total: int | None, progress: Advance | None):
        self.folder, self.total, self.progress = folder, total, progress
        self.pool = ThreadPoolExecutor()
        self.known: set[str] = set()

    def __enter__(self) -> _Painter:
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever stops the build does not wait for the pictures that nobody began.
        self.pool.shutdown(cancel_futures=True)

    @property
    def written(self) -> int:
        return len(self.known)

    def write(self, pictures: dict[str, Picture]) -> None:
        """Write those pictures that are not written yet."""
        new = [name for name in pictures if name not in self.known]
        for parent in {(self.folder / name).parent for name in new}:
            parent.mkdir(parents=True, exist_ok=True)

        def save(name: str) -> None:
            (self.folder / name).write_bytes(pictures[name].content())

        # The very first one alone: it may take tiles from a renderer, which is no matter for threads.
        first = 0 if self.known else 1
        for name in new[:first]:
            save(name)
        begun = len(self.known)
        for done, _ in enumerate(self.pool.map(save, new[first:]), begun + first + 1):
            if self.progress is not None:
                self.progress(done, self.total)
        self.known.update(new)
