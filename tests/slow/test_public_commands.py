"""The public code's two training commands, word for word behind the launcher: two ranks, the sample that ships."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from mirage_ds.cluster.here import free_ports

DATA = Path(__file__).parents[2] / "data"
STAGE1 = (
    "--model {model} --epochs 1 --task vsp-spatial-reasoning --latent_size 4 --stage stage1 "
    "--data_path ./data/sample.jsonl --log_file ./log.txt --save_model_path ./checkpoints/model_stage1 "
    "--cache_dir {cache}"
)
STAGE2 = (
    "--model {model} --epochs 1 --task vsp-spatial-reasoning --latent_size 4 --stage stage2 "
    "--data_path ./data/sample.jsonl --log_file ./log.txt --load_model_path ./checkpoints/model_stage1 "
    "--save_model_path ./checkpoints/model_stage2 --cache_dir {cache}"
)


def launch(command: str, folder: Path) -> None:
    binaries = Path(sys.executable).parent
    launcher = [binaries / "deepspeed", "--num_accelerators", 2, "--master_port", free_ports()]
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    words = [*map(str, launcher), "--module", "mirage_ds.train", *shlex.split(command)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_both_public_commands_train_and_save(nano: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    (tmp_path / "data").symlink_to(DATA, target_is_directory=True)
    place = dict(model=nano, cache=tmp_path / "cache")
    logs = {}
    for stage, command in (("stage1", STAGE1), ("stage2", STAGE2)):
        launch(command.format(**place), tmp_path)
        out = tmp_path / f"checkpoints/model_{stage}"
        logs[stage] = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
        # 100 rows, 8 a step.
        assert [line["step"] for line in logs[stage]] == list(range(1, len(logs[stage]) + 1))
        assert len(logs[stage]) in (12, 13)
        assert all(math.isfinite(line[name]) for line in logs[stage] for name in ("loss", "ce", "grad_norm"))
        _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(nano))
        assert (out / "preprocessor_config.json").is_file()
    sims = [line["sim"] for line in logs["stage1"]]
    assert mean(sims[-4:]) < mean(sims[:4]), sims
    said = (tmp_path / "log.txt").read_text()
    for stage, lines in logs.items():
        assert said.count(f"{stage}: 100 rows of ") == 1
        assert f"model saved to checkpoints/model_{stage}" in said
        for line in lines:
            assert f"step {line['step']}/{len(lines)} epoch {line['epoch']:.2f} loss {line['loss']:.4f}" in said
