"""The options that both guards take."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import click

from mirage_ds.cluster.guard.wire import Bounds, Verdict

Command = TypeVar("Command", bound=Callable[..., Any])

# The first word that is no option begins the guarded command; everything after it is passed on as it is.
CONTEXT = {"help_option_names": ["-h", "--help"], "ignore_unknown_options": True, "allow_interspersed_args": False}


def bounds_options(command: Command) -> Command:
    """Add the port, the job's name and one option for each bound."""
    help_texts = {
        "gather": "Seconds until the last rank has appeared.",
        "silence": "Seconds without a sign of life after which a host counts as lost.",
        "start": "Seconds without progress before the first step, in a save or a load.",
        "hang": "Seconds without progress anywhere else.",
        "grace": "Seconds for a process to leave by itself once the job has to end.",
    }
    for name, text in reversed(help_texts.items()):
        default = Bounds._field_defaults[name]
        command = click.option(
            f"--{name}", default=default, show_default=True, type=click.FloatRange(min=0.1), help=text
        )(command)
    command = click.option(
        "--job", default="mirage-ds", show_default=True, help="The job's name, the same everywhere."
    )(command)
    return click.option(
        "--port", required=True, type=click.IntRange(1, 65535), help="Port of the hub on rank 0's host."
    )(command)


def tell(lines: Sequence[str]) -> None:
    """Print the guard's lines to the error output; a console that is gone keeps nobody from leaving."""
    try:
        for line in lines:
            print(f"guard: {line}", file=sys.stderr, flush=True)  # after every other line of the job
    except OSError:
        return


def leave(verdict: Verdict, say: bool = True) -> NoReturn:
    """End this process at once, the reason as its last lines.

    Nothing is cleaned up: a thread may wait for a console or a disk that never answers, the event loop for its tasks.
    """
    if say and verdict.code:
        tell(verdict.lines)
    os._exit(verdict.code)
