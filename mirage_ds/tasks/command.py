"""`mirage-ds data build TASK` and `data convert TASK SOURCE`: each task has its own flags.

Tasks are imported when they are named: `--help` is quick.
"""

import inspect
from pathlib import Path
from typing import Any, Literal

import click

from mirage_ds.config.flags import CONTEXT, Group, build_model, model_options
from mirage_ds.errors import UserError
from mirage_ds.tasks import TASKS, get_task, task_name
from mirage_ds.tasks.task import Settings, Task

Way = Literal["build", "convert"]


class TaskGroup(Group):
    """One subcommand a task, made of the settings that the task has for this way to its records."""

    def __init__(self, way: Way, text: str):
        super().__init__(way, help=text, context_settings=CONTEXT, subcommand_metavar="TASK [OPTIONS]...")
        self.way = way

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the tasks that come with the package and have this way."""
        return [name for name in TASKS if getattr(get_task(name), f"{self.way}_settings")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Make a task's command.

        Raises:
            UserError: no such task, or it has not this way.
        """
        task = get_task(cmd_name)
        settings = getattr(task, f"{self.way}_settings")
        if settings is None:
            other = "convert" if self.way == "build" else "build"
            how = f"it has `data {other}`" if getattr(task, f"{other}_settings") else "it only scores"
            raise UserError(f"task {task_name(cmd_name)} has no `data {self.way}`; {how}")
        return _command(task_name(cmd_name), task, settings, self.way)


def _command(name: str, task: Task, settings: type[Settings], way: Way) -> click.Command:
    def run(source: Path | None = None, **flags: Any) -> None:
        from mirage_ds.tasks.build import build, convert, print_report

        wanted = build_model(settings, flags)
        print_report(build(name, wanted) if source is None else convert(name, source, wanted))

    if way == "convert":
        run = click.argument("source", type=click.Path(path_type=Path))(run)
    text = inspect.getdoc(getattr(task, way))
    return click.command(name, context_settings=CONTEXT, help=text)(model_options(settings)(run))
