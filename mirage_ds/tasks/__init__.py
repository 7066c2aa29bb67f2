"""The tasks by name. A task makes records, asks, reads answers and scores them; see `mirage_ds.tasks.task`."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mirage_ds.errors import UserError, closest, shown
from mirage_ds.files import own_modules_found

if TYPE_CHECKING:
    from mirage_ds.data.record import Record
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
# Of records where neither they nor --task name one.
DEFAULT = "boxed"
# What a report says of an answer besides its task's metrics.
NO_METRICS = ("count", "low", "high", "runs", "latents")
_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def own_name(name: str, what: str) -> str:
    """Return `package.module:name` as it stands; UserError where it is not of that form. Nothing is imported."""
    if not _OWN.fullmatch(name.strip()) or ".py:" in name:
        raise UserError(
            f"{what} '{name}' is not of the form package.module:name; write it as Python imports it, like "
            "scores:points for the function points in scores.py"
        )
    return name.strip()


def task_name(name: str) -> str:
    """Return the registered spelling of `name` (`-` and `_` are alike), or `package.module:name` as it stands.

    Nothing is imported.

    Raises:
        UserError: no such task; the message lists those there are.
    """
    if ":" in name:
        return own_name(name, "task")
    known = name.strip().lower().replace("_", "-")
    if known not in TASKS:
        there = f"{', '.join(TASKS)}, and your own as package.module:name"
        raise UserError(f"unknown task '{name}'{closest(known, TASKS)}; there are: {there}")
    return known


def named_task(record: Record, given: str | None) -> str | None:
    """Return the task of a record: --task's, else its own key `task`'s, else None.

    This is the rule of every command. What has to score such a record all the same takes DEFAULT.

    Args:
        given: --task.

    Raises:
        UserError: there is no task `given`.
        RecordError: the record's is no name, is code, or does not exist.
    """
    if given:
        return task_name(given)
    name = record.extra.get("task")
    # An empty cell of a table is none.
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise record.fault("task", f"expected a name, found {shown(name)}", "write it as a string, or give --task")
    if ":" in name:
        raise record.fault("task", f"{shown(name)} is code, which data must not choose", "give it with --task")
    try:
        return task_name(name)
    except UserError as error:
        raise record.fault("task", str(error), "give one of them with --task") from None


def level_of(record: Record) -> str:
    """Return what a record calls its level, else the side of its map, else "?"."""
    board = record.extra.get("map_desc")
    return str(record.extra.get("level", len(board) if board and isinstance(board, list) else "?"))


def seen_by_scorer(record: Record) -> dict[str, Any]:
    """Return what a scorer reads of a record: its own keys, its question, its pictures as lists of paths, its answer.

    A question alone has an empty answer, and nothing is to be compared with that: it has no `text_output`.
    """
    pictures = {"image_input": list(record.image_input), "image_output": list(record.image_output)}
    own = {"text_output": record.text_output} if record.text_output else {}
    return {**record.extra, "text_input": record.text_input, **pictures, **own}


def own_module(name: str, what: str) -> ModuleType:
    """Import a user's module, which may lie in the working directory; UserError, which `what` begins, if it fails."""
    with own_modules_found():
        try:
            return import_module(name)
        except Exception as error:
            from mirage_ds.tasks.scorer import told

            how = "fix it, install it, or start where it lies"
            raise UserError(f"{what}: {name} cannot be imported ({told(error)}); {how}") from error


def get_task(name: str) -> Task:
    """Make task `name`, importing its module only now, so that one task's requirements never burden another.

    A function is a task that only scores (tasks/scorer.py).

    Raises:
        UserError: no such task, its module cannot be imported, or what is named there is no whole task.
    """
    from mirage_ds.tasks.scorer import Scorer
    from mirage_ds.tasks.task import Task

    known = task_name(name)
    module_name, _, attribute = TASKS.get(known, known).partition(":")
    module = import_module(module_name) if known in TASKS else own_module(module_name, f"task '{known}'")
    found = getattr(module, attribute, None)
    if found is None:
        where, near = f"{module_name} ({module.__file__})", closest(attribute, vars(module))
        raise UserError(f"task '{known}': {where} has no {attribute}{near}; name what scores in it")
    if not inspect.isclass(found):
        return Scorer(known, found)
    if not issubclass(found, Task):
        raise UserError(f"task '{known}' is no subclass of mirage_ds.tasks.task.Task; make it one, or a function")
    if inspect.isabstract(found):
        missing = " and ".join(sorted(found.__abstractmethods__))
        raise UserError(f"task '{known}' has no {missing}; write it, see `mirage-ds docs tasks`")
    return found()
