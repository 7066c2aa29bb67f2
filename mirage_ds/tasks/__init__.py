"""The tasks by name. A task module makes records from boards (`make`), writes prompts, and scores answers (`score`)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from mirage_ds.errors import UserError, closest

TASKS = {
    "vsp-spatial-planning": "mirage_ds.tasks.vsp_planning",
    "vsp-spatial-reasoning": "mirage_ds.tasks.vsp_reasoning",
}


def task_name(name: str) -> str:
    """Return the registered spelling of `name`; `-` and `_` are alike.

    Raises:
        UserError: no such task; the message lists those there are.
    """
    known = name.strip().lower().replace("_", "-")
    if known not in TASKS:
        raise UserError(f"unknown task '{name}'{closest(known, TASKS)}; there are: {', '.join(TASKS)}")
    return known


def get_task(name: str) -> ModuleType:
    """Import the module of task `name` (only then, so that one task's requirements never burden another).

    Raises:
        UserError: no such task.
    """
    return import_module(TASKS[task_name(name)])
