"""docs/first_hour.md, command by command in an empty folder, on fewer and shorter rows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# What the walk's two files are made smaller by; each must be there.
SMALLER = {
    "records.py": (('("train", 1000, 0), ("test", 400, 1)', '("train", 96, 0), ("test", 12, 1)'),),
    "study.yaml": (("epochs: 3", "epochs: 1"), ("seeds: [0, 1]", "seeds: [0]")),
}


def page() -> str:
    return (REPO / "docs/first_hour.md").read_text()


@pytest.mark.slow
def test_the_page_shows_the_files_it_speaks_of() -> None:
    example = REPO / "examples/first_hour"
    assert f"```yaml\n{(example / 'study.yaml').read_text()}```" in page()
    assert len((example / "records.py").read_text().splitlines()) <= 30
    assert {file.name for file in example.iterdir()} == set(SMALLER)


@pytest.mark.slow
def test_its_commands_lead_to_a_report(tmp_path: Path) -> None:
    for name, changes in SMALLER.items():
        shutil.copy(REPO / "examples/first_hour" / name, tmp_path)
        text = (tmp_path / name).read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page(), re.S) for line in block.splitlines()]
    assert len(commands) == 7
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        made = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, f"{command}\n{made.stdout[-2000:]}{made.stderr[-2000:]}"
    report = json.loads((tmp_path / "runs/report/report.json").read_text())
    assert report["primary"]["arm"] == "latents"
    assert report["primary"]["steps"] == {"arm": [6], "base": [6]}
    assert (tmp_path / "runs/report/report.html").is_file()
