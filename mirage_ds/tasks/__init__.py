"""The tasks by name. A task makes records, asks, reads answers and scores them; see `mirage_ds.tasks.task`."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mirage_ds.errors import UserError, closest, reason

if TYPE_CHECKING:
    from mirage_ds.tasks.task import Task

TASKS = {
    "vsp-spatial-planning": "mirage_ds.tasks.vsp_planning:Planning",
    "vsp-spatial-reasoning": "mirage_ds.tasks.vsp_reasoning:Reasoning",
    "vsp-transcription": "mirage_ds.tasks.vsp_reading:Transcription",
    "vsp-path-reading": "mirage_ds.tasks.vsp_reading:PathReading",
    "blink-jigsaw": "mirage_ds.tasks.jigsaw:Jigsaw",
    "sat": "mirage_ds.tasks.sat:Sat",
    "comt": "mirage_ds.tasks.comt:Comt",
    "monet-sft": "mirage_ds.tasks.published:Monet",
    "lvr": "mirage_ds.tasks.published:Lvr",
    "zebra-cot": "mirage_ds.tasks.published:Zebra",
    "boxed": "mirage_ds.tasks.boxed:BoxedAnswer",
}
_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def task_name(name: str) -> str:
    """Return the registered spelling of `name` (`-` and `_` are alike), or `package.module:Name` as it stands.

    Nothing is imported.

    Raises:
        UserError: no such task; the message lists those there are.
    """
    if ":" in name:
        if not _OWN.fullmatch(name.strip()):
            raise UserError(f"task '{name}' is not of the form package.module:Name; write the class's full name")
        return name.strip()
    known = name.strip().lower().replace("_", "-")
    if known not in TASKS:
        raise UserError(
            f"unknown task '{name}'{closest(known, TASKS)}; there are: {', '.join(TASKS)}, "
            "and your own as package.module:Name"
        )
    return known


def get_task(name: str) -> Task:
    """Make task `name`, importing its module only now, so that one task's requirements never burden another.

    Own modules are looked for where Python looks, and last in the working directory.

    Raises:
        UserError: no such task, its module cannot be imported, or the class is no whole task.
    """
    from mirage_ds.tasks.task import Task

    known = task_name(name)
    module_name, _, attribute = TASKS.get(known, known).partition(":")
    if known not in TASKS and str(Path.cwd()) not in sys.path:
        # Unlike `python -m`, an installed command does not look there by itself.
        sys.path.append(str(Path.cwd()))
    try:
        module = import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"task '{known}': {module_name} cannot be imported ({reason(error)}); fix it, install it, or start where "
            "it lies"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        names = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Task)]
        raise UserError(f"task '{known}': {module_name} has no {attribute}{closest(attribute, names)}; name its class")
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise UserError(f"task '{known}' is no subclass of mirage_ds.tasks.task.Task; make it one, see docs/tasks.md")
    if inspect.isabstract(found):
        missing = " and ".join(sorted(found.__abstractmethods__))
        raise UserError(f"task '{known}' has no {missing}; write it, see docs/tasks.md")
    return found()
