"""What is refused before any rank starts: sockets of data workers that TMPDIR is too long for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirage_ds.config.run import RunConfig
from mirage_ds.errors import UserError
from mirage_ds.run.beforehand import MOST_TMPDIR_BYTES, check_beforehand

LISTEN = "from multiprocessing.connection import Listener; Listener(family='AF_UNIX').close()"


@pytest.fixture
def folder_of() -> Iterator[Callable[[int], Path]]:
    """Make a folder whose name has so many bytes, some of them in letters of two: folder_of(75)."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as top:

        def make(count: int) -> Path:
            made = Path(top) / ("é" * 4 + "x" * (count - len(top) - 9))
            made.mkdir()
            assert len(os.fsencode(made)) == count
            return made

        yield make


def settings(tmp_path: Path, workers: int) -> RunConfig:
    data = tmp_path / "data.jsonl"
    data.touch()
    asked = {"model": "some/model", "stage": "sft", "data_path": data, "save_model_path": tmp_path / "out"}
    return RunConfig(num_workers=workers, **asked)


def test_the_bound_is_where_multiprocessing_fails(folder_of: Callable[[int], Path]) -> None:
    """A worker makes its socket by this very call (multiprocessing.resource_sharer)."""
    for count in (MOST_TMPDIR_BYTES, MOST_TMPDIR_BYTES + 1):
        given = os.environ | {"TMPDIR": str(folder_of(count))}
        done = subprocess.run([sys.executable, "-c", LISTEN], env=given, capture_output=True, text=True, check=False)
        assert ("AF_UNIX path too long" in done.stderr) == (count > MOST_TMPDIR_BYTES), done.stderr


def test_a_longer_one_is_refused(
    folder_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder_of(75)))
    check_beforehand(settings(tmp_path, workers=2), 1)
    monkeypatch.setattr(tempfile, "tempdir", str(folder_of(76)))
    check_beforehand(settings(tmp_path, workers=0), 1)
    with pytest.raises(UserError, match=r"^--num_workers 2: .* has 76 bytes and may have 75; set TMPDIR to a shorter"):
        check_beforehand(settings(tmp_path, workers=2), 1)
