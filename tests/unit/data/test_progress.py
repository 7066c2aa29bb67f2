"""Bars where there is a terminal, lines where there is none, neither for quick work."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mirage_ds.data import progress
from mirage_ds.data.progress import clock, track

PROGRAM = """
import time
from mirage_ds.data import progress
progress.EVERY_S = 0.05
for _ in progress.track(range(4), "reading"):
    time.sleep(0.06)
print("done")
"""


def test_in_a_pipe_a_line_is_said_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 1.0, 29.0, 31.0, 32.0, 40.0, 100.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(track(iter("abcde"), "reading", total=5)) == ["a", "b", "c", "d", "e"]
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.splitlines() == ["reading: 2 of 5, 0:00:46 left", "reading: 5 of 5, 0:00:00 left"]


def test_what_has_no_end_says_how_much_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.progress_bar("pictures") as advance:
        advance(3, None)
    assert capsys.readouterr().err == "pictures: 3\n"


def test_quick_and_quiet_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2], "reading")) == [1, 2]
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    assert list(track([1, 2], "reading", quiet=True)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def pieces(end: int) -> Iterator[bytes]:
    try:
        while piece := os.read(end, 1 << 16):
            yield piece
    except OSError:
        # The other end is closed.
        return


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        drawn = b"".join(pieces(ours)).decode()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(ours)
    assert "reading" in drawn
    assert "4/4" in drawn
    assert drawn.endswith("done\r\n")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (36e4, "100:00:00")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
