"""benchmarks/gpu in its CPU form: every part runs, and gives the numbers that it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import REPO


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    words = ["-m", "benchmarks.gpu", "first", "second", "--cpu", "--out", tmp_path]
    ended = subprocess.run([sys.executable, *map(str, words)], cwd=REPO, check=False)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    log = (tmp_path / "log.txt").read_text()
    assert [line["part"] for line in lines if not line["ok"]] == [], log[-4000:]
    assert ended.returncode == 0
    found = {line["part"]: line["result"] for line in lines}
    assert found.keys() == {
        *("machine", "model", "stage2", "stage1", "tests", "nano", "sft", "decode", "recipes"),
    }
    for name in ("sft", "stage1", "stage2"):
        assert found[name]["product"]["tokens_per_s"]["median"] > 0
        assert found[name]["planned"]["memory_gb"] > 0
    assert found["stage2"]["thin_pass"].keys() == {"ms", "host_ms"}
    assert all(
        found["stage2"]["product_profile"]["seconds"][kind] > 0
        for kind in ("attention", "products", "optimizer", "copies")
    )
    # The same rows from the same weights, in float32.
    assert found["sft"]["losses_apart"] < 1e-5
    # A shipped recipe took its step; those that need a GPU are known and left out.
    assert found["recipes"]["passed"] > 0
    assert found["recipes"]["skipped"] > 0
    assert found["tests"]["skipped"] > 0
    assert found["decode"]["tokens_per_s"] > 0
