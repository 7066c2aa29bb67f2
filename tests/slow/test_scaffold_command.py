"""Learned targets through the commands themselves: scaffold, stage1 with its own states, stage2, controls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.on_disk import log_of

PYTHON = [sys.executable, "-m", "mirage_ds"]
# Two ranks are in tests/dist/test_scaffold_ranks.py; one starts in half of the time.
SHARED = ["--ranks", "1", "--latent_size", "2", "--global_batch_size", "4", "--num_workers", "0", "--max_steps", "3"]
SHARED += ["--learning_rate", "1e-3", "--warmup_steps", "0", "--report_to", "none"]


def run(*words: object, code: int = 0) -> str:
    done = subprocess.run([*PYTHON, *map(str, words)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def helped(mixed: Path) -> Path:
    rows = [line for line in mixed.read_text().splitlines() if "image_output" in json.loads(line)]
    path = mixed.parent / "helped.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.slow
def test_from_a_scaffold_to_controls(nano: Path, helped: Path, tmp_path: Path) -> None:
    train = ["train", "--model", nano, "--data_path", helped, *SHARED]
    learned, own, last = (tmp_path / name for name in ("learned", "own", "last"))
    evaluated = ["--eval_data_path", helped, "--eval_every", 1]
    run(*train, "--stage", "scaffold", "--train_vision", "--save_model_path", learned, *evaluated)
    first, *_, end = (line["eval_ce"] for line in log_of(learned, evaluations=True))
    assert end < first
    # It is no model.
    said = run(*train, "--stage", "stage2", "--load_model_path", learned, "--save_model_path", last, code=2)
    assert "holds learned targets (--stage scaffold) and no model; give it as --latent_targets" in said
    how = ["--latent_targets", learned, "--feed", "own", "--latent_loss", "l2", "--ce_weight", 0.5]
    run(*train, "--stage", "stage1", *how, "--save_model_path", own)
    run(*train, "--stage", "stage2", "--load_model_path", own, "--save_model_path", last)
    out = tmp_path / "controls.json"
    words = ["--latents", "oracle", "--latent_targets", learned, "--task", "boxed", "--max_new_tokens", 4]
    run("controls", last, "--data_path", helped, *words, "--out", out)
    report = json.loads(out.read_text())
    assert set(report["conditions"]) == {"own", "oracle"}
    assert len(report["settings"]["latent_targets"]) == 64
