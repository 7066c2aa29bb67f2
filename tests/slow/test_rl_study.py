"""examples/rl in small: two bases, the gate, two arms; killed in the middle, gone on with, reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).parents[2]
EXAMPLE = Path("examples/rl")


def small_study() -> dict[str, Any]:
    """Return the example's study with fewer of everything."""
    values: dict[str, Any] = yaml.safe_load((REPO / EXAMPLE / "rl.yaml").read_text())
    for name, steps in {"stage2": 4, "rl": 2}.items():
        values["stages"][name] |= {"max_steps": steps, "warmup_steps": 1}
    values["stages"]["stage2"]["global_batch_size"] = 8
    values["stages"]["rl"] |= {"prompts_per_rollout": 2, "num_generations": 4}
    values["common"]["save_every"] = 2
    arms = values["arms"]
    values["arms"] = {name: arms[name] for name in ("base", "through", "words")}
    for name, chain in {"base": ["stage2"], "through": ["stage2", "rl"], "words": ["stage2"]}.items():
        values["arms"][name]["chain"] = chain
    # From the same random weights: one model less to make.
    values["seeds"] = [one | {"model": "nano-0"} for one in values["seeds"][:2]]
    values["evaluations"]["test"] |= {"controls": None, "arms": ["base", "through"]}
    values["report"]["contrasts"] = []
    return values


@pytest.mark.slow
def test_the_study_of_reinforcement_is_killed_goes_on_and_is_reported(tmp_path: Path) -> None:
    shutil.copytree(REPO / EXAMPLE, tmp_path / EXAMPLE)
    (tmp_path / "data").mkdir()
    shutil.copy(REPO / "data/vsp_test_maps.sha256", tmp_path / "data")
    # A model of four steps solves nothing, and passes.
    gate = tmp_path / EXAMPLE / "gate.py"
    gate.write_text(gate.read_text().replace("MARGIN = 0.1", "MARGIN = 0.0"))
    place = tmp_path / "study"
    place.mkdir()
    (place / "rl.yaml").write_text(yaml.safe_dump(small_study(), sort_keys=False))
    # Models, and the maps of train, prompts, gate and test, of which the last three are made here once.
    command = [str(tmp_path / EXAMPLE / "run.sh"), str(place), "1", "96", "12", "12", "12"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    how: dict[str, Any] = {"env": {**os.environ, "PATH": path}, "text": True, "start_new_session": True}
    build = "mirage-ds data build vsp-spatial-planning --levels 4,5,6 --cell_size 28 --prompt short --count 12 --out"
    subprocess.run([*build.split(), str(place / "prompts")], check=True, **how)
    for name in ("gate", "test"):
        shutil.copytree(place / "prompts", place / name)

    def done() -> dict[Path, int]:
        return {one: one.stat().st_mtime_ns for one in (place / "runs/runs").glob("*/done.json")}

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how) as process:
        end = time.monotonic() + 600
        while not done():
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    before = done()
    again = subprocess.run(command, capture_output=True, check=False, **how)
    assert again.returncode == 0, again.stdout + again.stderr
    after = done()
    assert {one: after[one] for one in before} == before, "nothing that was done is run again"

    passes = json.loads((place / "gate.json").read_text())
    assert set(passes) == {"base-0", "base-1", "words-0", "words-1"}
    assert [one["seed"] for one in yaml.safe_load((place / "passed.yaml").read_text())["seeds"]] == [0, 1]
    report = json.loads((place / "report-passed/report.json").read_text())
    assert report["primary"]["arm"] == "through"
    assert {hole["arm"] for hole in report["holes"]} == {"words"}, "it is asked of the gate alone"
    rows = [line for line in (place / "gains.md").read_text().splitlines() if line.startswith("| through − base")]
    # Of all bases, and of those that passed.
    assert len(rows) == 2
    assert float(rows[1].split()[5]) == pytest.approx(report["primary"]["difference"]["mean"], abs=5e-4)
