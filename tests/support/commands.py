"""Commands as a user calls them, in the suite's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from mirage_ds.cli import main

# Words of a command → exit code, standard output, standard error.
Call = Callable[..., tuple[int, str, str]]


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> Call:
    """Make a function that runs `mirage-ds` with `words` and what it is given."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mirage-ds", *words, *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        return (code, *capsys.readouterr())

    return run
