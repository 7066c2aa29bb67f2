"""A short chaos run: killed once in each phase, it ends equal to an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_equal(tmp_path: Path) -> None:
    out = tmp_path / "chaos"
    # With this seed the kills come early, and a checkpoint is damaged after three of the four.
    words = ("--kills", "4", "--each", "1", "--steps", "14", "--seed", "17", "--out", str(out))
    command = [sys.executable, "-m", "benchmarks.chaos", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "chaos.json").read_text())
    assert report["problems"] == []
    assert len(report["kills"]) == 4
    met = Counter(kill["phase"] for kill in report["kills"])
    assert sum(met.values()) == 4
    assert met["step"] + met["load"] + met["save"] + met["evaluation"] == 4
