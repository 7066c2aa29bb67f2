"""How a process that is one rank of many runs its command, and how it leaves."""

from __future__ import annotations

import os
import sys
import warnings

import click

from mirage_ds.errors import EXIT_USER_ERROR, UserError
from mirage_ds.stop import EXIT_STOPPED, Stopped


def run_rank(command: click.Command) -> None:
    """Run a command; a user's mistake is one sentence, said once, and exit code 2 on every rank."""
    # DeepSpeed calls collectives that torch has renamed: nothing the user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    says = os.environ.get("RANK", "0") == "0"
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        # What goes wrong in the middle of a run may be known to one rank alone.
        message, says = str(error), says or not error.everywhere
    except Stopped:
        sys.exit(EXIT_STOPPED)
    else:
        return
    if says:
        print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201  # before any console exists
    sys.stdout.flush()
    # No clean-up that waits for other ranks: they may be waiting in a collective for this one.
    os._exit(EXIT_USER_ERROR)
