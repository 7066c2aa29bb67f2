"""Stop files."""

from __future__ import annotations

import os
from pathlib import Path

from mirage_ds.run.stop import StopRequest


def test_a_stop_file_counts_if_it_is_written_after_the_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mirage_ds.run.stop.LOOK_EVERY_S", 0)
    file = tmp_path / "run/stop"
    request = StopRequest(file)
    assert not request.asked()
    file.parent.mkdir()
    file.touch()
    assert request.asked()
    # The next start finds what the one before was stopped by.
    later = StopRequest(file)
    assert not later.asked()
    os.utime(file)
    assert later.asked()
