"""A short chaos run: killed once in each phase, it ends equal to an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import PHASES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words"),
    [
        # With these seeds the kills come early, and a checkpoint is damaged after some of them.
        ("stage2", ("--kills", "4", "--steps", "14", "--seed", "17")),
        # One rank, without a launcher, starts in less than half of the time; two are in tests/dist/test_rl.py.
        ("rl", ("--kills", "3", "--steps", "12", "--seed", "15", "--ranks", "1")),
    ],
)
def test_a_run_killed_in_every_phase_ends_equal(stage: str, words: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    command = [sys.executable, "-m", "benchmarks.chaos", "--stage", stage, *words, "--each", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "chaos.json").read_text())
    assert report["problems"] == []
    assert len(report["kills"]) == int(words[1])
    assert {kill["phase"] for kill in report["kills"]} <= {*PHASES[stage], "load"}
