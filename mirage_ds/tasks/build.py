"""Make a task's records, write them, whole or not at all (see `mirage_ds.tasks.write`), and tell the counts."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from mirage_ds.data.record import RecordError, make_record
from mirage_ds.errors import UserError, shown
from mirage_ds.tasks import get_task, task_name
from mirage_ds.tasks.draft import BuildReport, Draft
from mirage_ds.tasks.task import Settings, Task
from mirage_ds.tasks.write import Row, new_target, write_rows


def build(task: str, settings: Settings) -> BuildReport:
    """Write `settings.out`/NAME.jsonl and the pictures it names, relative to it, under `settings.out`/images/.

    Args:
        task: a name of `mirage_ds.tasks.TASKS`, or package.module:Name.
        settings: of the task's `build_settings`.

    Raises:
        UserError: an unknown task, a target that exists, what the task itself says.
    """
    made, report = get_task(task), BuildReport(task_name(task), new_target(settings))
    return _write(made, made.build(settings, report), settings, report)


def convert(task: str, source: Path, settings: Settings) -> BuildReport:
    """Write the records of a file or folder in another form; as `build`, with the task's `convert_settings`."""
    made, report = get_task(task), BuildReport(task_name(task), new_target(settings))
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check the path")
    return _write(made, made.convert(source, settings, report), settings, report)


def _write(task: Task, drafts: Iterable[Draft], settings: Settings, report: BuildReport) -> BuildReport:
    rows = _rows(task, drafts, settings, report)
    report.images = write_rows(list(rows) if isinstance(drafts, Sequence) else rows, settings).images
    return report


def _rows(task: Task, drafts: Iterable[Draft], settings: Settings, report: BuildReport) -> Iterator[Row]:
    """Make the drafts' rows and count them; UserError where there is none."""
    for draft in drafts:
        yield _row(task, draft, settings, report.task)
        report.records += 1
        if (level := draft.extra.get("level")) is not None:
            report.levels[level] += 1
        if draft.kind:
            report.classes[draft.kind] += 1
    if not report.records:
        lost = {**report.notes, "excluded": report.excluded}
        told = ", ".join(f"{what}: {count}" for what, count in lost.items() if count)
        why = f"what was left out: {told}; change the settings" if told else "there was nothing to make one of"
        raise UserError(f"task {report.task} has made no record; {why}")


def _row(task: Task, draft: Draft, settings: Settings, name: str) -> Row:
    """Make a row, and refuse one that training or the scorer would refuse much later.

    Raises:
        UserError: the task's question or answer is not right.
    """
    row = Row("", draft.text_output, draft.images, draft.helpers, draft.extra | {"task": draft.extra.get("task", name)})
    known = row.record(settings.out)
    del known["text_input"], known["text_output"]
    row = row._replace(text_input=task.prompt(known, settings))
    record = row.record(settings.out)
    if draft.text_output and task.parse(draft.text_output, record) is None:
        raise UserError(f"task {name} reads no answer out of its own {shown(draft.text_output)}; fix build or parse")
    try:
        make_record(record, 1, answers=bool(draft.text_output))
    except RecordError as error:
        fault = error.fault
        raise UserError(f"task {name} makes a record with {fault.what} in {fault.field}; {fault.how}") from None
    return row


def print_report(report: BuildReport) -> None:
    """Print the counts as a table on stdout."""
    counts: list[tuple[str, int]] = [("records", report.records), ("images written", report.images)]
    levels = sorted(report.levels.items(), key=lambda item: str(item[0]))
    counts += [(f"level {level}", count) for level, count in levels]
    classes = sorted(report.classes.items(), key=lambda item: (len(item[0]), item[0]))
    counts += [(f"answer {kind}", count) for kind, count in classes]
    twice = f"duplicates {'kept' if report.duplicates_kept else 'removed'}"
    counts += [(twice, report.duplicates), ("excluded", report.excluded), *report.notes.items()]
    print_counts(f"{report.task}: {report.file}", counts)


def print_counts(title: str, counts: Iterable[tuple[str, int | str]]) -> None:
    """Print a title, if there is one, and a table of counts on stdout."""
    console = Console()
    if title:
        console.print(title, soft_wrap=True, highlight=False, markup=False)
    table = Table("what", Column("count", justify="right"))
    for what, count in counts:
        table.add_row(what, str(count))
    console.print(table)
