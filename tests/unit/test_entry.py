"""How a rank leaves: what it said is not lost, and nothing that goes wrong afterwards changes its code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mirage_ds.stop import EXIT_STOPPED

# What gloo's threads do to a process whose interpreter is being taken down, made certain.
PROGRAM = """
import atexit, os, sys
import click
from mirage_ds.entry import run_rank
from mirage_ds.errors import UserError
from mirage_ds.stop import Stopped

class Thread:
    def __del__(self, abort=os.abort): abort()

sys.modules["lives_as_long_as_the_interpreter"] = Thread()
atexit.register(print, "handler")

@click.command()
@click.argument("ends")
def command(ends):
    print("said", end=" ")
    if ends == "stop": raise Stopped
    if ends == "mistake": raise UserError("a mistake")

run_rank(command)
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [("well", 0, "said handler\n"), ("stop", EXIT_STOPPED, "said handler\n"), ("mistake", 2, "said ")],
)
def test_an_end_is_the_end_whatever_the_interpreter_does_after_it(ends: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, ends], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == said
    assert done.stderr == ("error: a mistake\n" if ends == "mistake" else "")
