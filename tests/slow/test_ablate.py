"""`mirage-ds ablate` for real: three arms, two seeds, one arm that fails, a stop in the middle, and the report."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

STEPS = 10
EXAMPLE = Path(__file__).parents[2] / "examples" / "study" / "small.yaml"


def mirage(*arguments: object, folder: Path, code: int = 0) -> str:
    command = Path(sys.executable).parent / "mirage-ds"
    done = subprocess.run([str(command), *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    build = ("data", "build", "vsp-spatial-planning", "--levels", "4,5", "--cell_size", 28, "--prompt", "short")
    mirage(*build, "--count", 64, "--out", "train", folder=folder)
    mirage(*build, "--count", 12, "--split", "test", "--out", "test", folder=folder)
    mirage("init", "--preset", "nano-untied", "--out", "nano", "--text", "train/data.jsonl", folder=folder)
    # The example that docs/studies.md walks through, shorter, with an arm that fails.
    values: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    values["common"] |= {
        "max_steps": STEPS,
        "global_batch_size": 8,
        "warmup_steps": 1,
        "save_every": 4,
        "num_workers": 0,
        "gradient_checkpointing": False,
    }
    values["out"] = "runs"
    # The arm of text alone is in test_first_hour.py.
    values["arms"] = {name: values["arms"][name] for name in ("pause", "mirage")}
    values["arms"]["pause"]["chain"] = ["base", "sft"]
    # 25 features do not make 30 latents: found by the run itself, when it measures its records.
    broken = {"chain": ["base", "stage1"], "settings": {"stage1.latent_size": 30}, "about": "fails"}
    values["arms"]["broken"] = broken
    values["evaluations"]["test"] |= {"max_new_tokens": 12, "controls": "own,zero"}
    values["report"]["primary"]["base"] = "pause"
    values["report"]["contrasts"] = [{"arm": "broken", "base": "pause", "evaluation": "test"}]
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


def models(study: Path, name: str) -> list[Path]:
    return sorted((study / "runs" / "runs").glob(f"{name}-*/model"))


@pytest.mark.slow
def test_a_study_is_stopped_goes_on_and_is_reported(study: Path) -> None:
    assert "9 training runs instead of 14" in mirage("ablate", "plan", "study.yaml", folder=study)
    command = [str(Path(sys.executable).parent / "mirage-ds"), "ablate", "run", "study.yaml", "--jobs", "2"]
    with subprocess.Popen(command, cwd=study, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        # Stop once a run of the arms has a checkpoint, so that it goes on from there.
        end = time.monotonic() + 120
        while not list((study / "runs" / "runs").glob("s*-*/model/run/checkpoints/global_step4")):
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    stopped = [one for name in ("sft", "stage1") for one in models(study, name) if not (one / "config.json").exists()]
    assert stopped
    said_by = [(one.parent / "output.log").read_text() for one in stopped]
    # One may have been met before its first step; the one that had a checkpoint goes on from a step.
    assert all("stopped on request" in text for text in said_by)
    assert any("stopped on request after step" in text for text in said_by)
    before = {place: place.stat().st_mtime_ns for place in (study / "runs" / "runs").glob("*/done.json")}

    # The broken arm's two runs fail; all else is done.
    said = mirage("ablate", "run", "study.yaml", "--jobs", "2", folder=study, code=1)
    assert "base-" not in said, "it was done before the stop"
    assert all(place.stat().st_mtime_ns == changed for place, changed in before.items())
    status = json.loads(mirage("ablate", "status", "study.yaml", "--json", folder=study))
    assert status["arms"] == {"pause": {"done": 2}, "mirage": {"done": 2}, "broken": {"failed": 2}}
    assert all("fewer than latent_size 30" in why for why in status["failed"].values())
    # A stopped run took every step once.
    for name in ("base", "sft", "stage1", "stage2"):
        for one in models(study, name):
            if (one / "config.json").exists():
                lines = [json.loads(line) for line in (one / "run/log.jsonl").read_text().splitlines()]
                assert [line["step"] for line in lines] == list(range(1, STEPS + 1))

    mirage("ablate", "report", "study.yaml", folder=study)
    report = json.loads((study / "runs/report/report.json").read_text())
    assert len(report["holes"]) >= 2
    text = (study / "runs/report/report.md").read_text()
    assert "Primary endpoint, mirage − pause" in text
    assert "fewer than latent\\_size 30" in text or "fewer than latent_size 30" in text
    with (study / "runs/report/report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows if row["score"]} == {"pause", "mirage"}
    # The table's score is the mean of the results on disk.
    results = [json.loads(one.read_text()) for one in (study / "runs/runs").glob("evaluate-*/result.json")]
    whole = [sum(answer["metrics"]["success"] for answer in one["answers"]) / len(one["answers"]) for one in results]
    scores = sorted(float(row["score"]) for row in rows if row["score"] and row["level"] in ("", "all"))
    assert scores == pytest.approx(sorted(whole))
    assert len(list((study / "runs/report/figures").glob("*.png"))) >= 4


@pytest.mark.slow
def test_a_finished_study_is_not_run_again(study: Path) -> None:
    begun = time.monotonic()
    said = mirage("ablate", "run", "study.yaml", folder=study, code=1)
    assert "begins" not in said
    assert time.monotonic() - begun < 20
    assert os.path.getsize(study / "runs/report/report.html") > 50_000
