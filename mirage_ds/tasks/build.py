"""Make a task's records and write them, whole or not at all (see `mirage_ds.tasks.write`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError, shown
from mirage_ds.tasks import get_task, task_name
from mirage_ds.tasks.draft import INPUT_IMAGE, OUTPUT_IMAGE, Draft, Picture
from mirage_ds.tasks.report import Advance, BuildReport
from mirage_ds.tasks.task import Settings, Task
from mirage_ds.tasks.write import Line, image_keys, new_pictures, new_target, write_records


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
    return made, BuildReport(task_name(task), new_target(settings.out, settings.name))


def _write(
    task: Task, drafts: Iterable[Draft], settings: Settings, report: BuildReport, progress: Advance | None
) -> BuildReport:
    total = None
    if isinstance(drafts, Sequence):
        total = len(new_pictures(settings.out, map(_pictures, drafts)))
    lines = _lines(task, drafts, settings, report)
    report.images = write_records(settings.out, settings.name, lines, total, progress).images
    return report


def _lines(task: Task, drafts: Iterable[Draft], settings: Settings, report: BuildReport) -> Iterator[Line]:
    """Yield the drafts' lines and count them; UserError where there is none."""
    for draft in drafts:
        record = _record(task, draft, settings, report.task)
        report.records += 1
        if (level := draft.extra.get("level")) is not None:
            report.levels[level] = report.levels.get(level, 0) + 1
        if draft.kind:
            report.classes[draft.kind] = report.classes.get(draft.kind, 0) + 1
        yield json.dumps(record, ensure_ascii=False) + "\n", _pictures(draft)
    if not report.records:
        lost = {**report.notes, "excluded": report.excluded}
        told = ", ".join(f"{what}: {count}" for what, count in lost.items() if count)
        why = f"what was left out: {told}; change the settings" if told else "there was nothing to make one of"
        raise UserError(f"task {report.task} has made no record; {why}")


def _pictures(draft: Draft) -> dict[str, Picture]:
    """Return a draft's pictures by their path beside the JSONL file."""
    return {f"images/{picture.name}": picture for picture in (*draft.images, *draft.helpers)}


def _record(task: Task, draft: Draft, settings: Settings, name: str) -> dict[str, Any]:
    """Return the JSON row, and refuse one whose marks or whose own answer do not fit.

    Raises:
        UserError: the task's question or answer is not right; the trainer or the scorer would say so much later.
    """
    inputs, helpers = ([f"images/{picture.name}" for picture in own] for own in (draft.images, draft.helpers))
    row = image_keys(inputs, helpers) | draft.extra
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
        raise UserError(f"task {name} reads no answer out of its own {shown(draft.text_output)}; fix build or parse")
    return record
