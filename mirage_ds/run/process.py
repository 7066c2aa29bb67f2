"""How a process that is one rank of many knows its place, runs its command, and leaves."""

import atexit
import io
import os
import sys
import warnings
from typing import NoReturn

import click

from mirage_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError
from mirage_ds.files import users_error

# As Python, DeepSpeed's launcher and transformers have them.
LEVELS = ("debug", "info", "warning", "error", "critical")


def print_anything() -> None:
    """Let a terminal or log that is not UTF-8 have '?' for what it cannot hold: a dash must not end a run.

    Every entry point calls it first.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def hush() -> None:
    """Keep libraries from printing what nobody has to act upon, unless the user has said otherwise.

    Before torch is imported. MIRAGE_LOG_LEVEL (debug, info, warning) brings their lines back, and -W or PYTHONWARNINGS
    Python's warnings. Another level ends the process.
    """
    level = os.environ.get("MIRAGE_LOG_LEVEL", "error").lower()
    if level not in LEVELS:
        print(f"error: MIRAGE_LOG_LEVEL={level}: give {', '.join(LEVELS)}", file=sys.stderr)  # noqa: T201  # no console yet
        sys.exit(EXIT_USER_ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", level)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", {"debug": "INFO", "critical": "FATAL"}.get(level, level.upper()))
    if level == "error" and not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(torch|transformers|deepspeed|accelerate|peft)\b")


def run_rank(command: click.Command, alone: bool = False) -> None:
    """Run a command; a user's error is one sentence, printed once, and exit code 2 on every rank.

    Args:
        alone: the other ranks may know nothing of an error of this one, so it prints its own.
    """
    print_anything()
    hush()
    try:
        command.main(standalone_mode=False)
    except Stopped as stop:
        if not stop.told and os.environ.get("RANK", "0") == "0":
            print("stopped", file=sys.stderr)  # noqa: T201  # there may be no console
        leave(EXIT_STOPPED)
    # A full disk, or a cache that cannot be written, may be met by any rank.
    except (click.ClickException, UserError, OSError) as error:
        message = users_error(error)
        if message is None:
            raise
        own = isinstance(error, OSError) or (isinstance(error, UserError) and not error.everywhere)
        if own or alone or os.environ.get("RANK", "0") == "0":
            print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201  # before any console exists
        sys.stdout.flush()
        # No clean-up that waits for other ranks: they may be waiting in a collective for this one.
        os._exit(EXIT_USER_ERROR)
    leave(0)


def leave(code: int) -> NoReturn:
    """End this process once all that it had to do is done, without taking the interpreter down.

    DeepSpeed keeps references to its process groups, so gloo's threads outlive `destroy_process_group`; one that drops
    its last tensor while the interpreter is being taken down aborts the process ("terminate called without an active
    exception", https://github.com/pytorch/pytorch/pull/179291), and a launcher then takes a finished run for a failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
