"""The three stages one after the other through the real launcher, as a user runs them: two ranks, ZeRO-3, real maps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

STEPS, ROWS = 12, 32


def deepspeed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Launch training on two ranks and return the finished process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries = Path(sys.executable).parent
    command = [binaries / "deepspeed", "--num_accelerators", 2, "--master_port", port, "--module", "mirage_ds.train"]
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [str(part) for part in (*command, *arguments)], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_losses_fall_through_the_stages(tmp_path: Path) -> None:
    """On records of the benchmark's picture size with the full prompt: planning, then reasoning too."""
    from mirage_ds.model.init import init_model
    from mirage_ds.tasks.board_task import BuildSpec
    from mirage_ds.tasks.build import build

    build("vsp-spatial-planning", BuildSpec(out=tmp_path / "planning", count=ROWS))
    build("vsp-spatial-reasoning", BuildSpec(out=tmp_path / "reasoning", count=ROWS, answer="cot"))
    planning, reasoning = tmp_path / "planning/data.jsonl", tmp_path / "reasoning/data.jsonl"
    init_model("nano", tmp_path / "nano", texts=[planning, reasoning])
    weights = tmp_path / "nano"
    for stage, records in (("sft", [planning]), ("stage1", [planning, reasoning]), ("stage2", [planning, reasoning])):
        out = tmp_path / stage
        finished = deepspeed(
            *("--model", tmp_path / "nano", "--load_model_path", weights, "--stage", stage),
            *(word for one in records for word in ("--data_path", one)),
            *("--save_model_path", out, "--global_batch_size", 4, "--warmup_steps", 2),
            *("--max_steps", STEPS, "--learning_rate", 1e-3, "--save_every", STEPS),
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "row(s) dropped" not in finished.stdout
        lines = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        losses = [line["loss"] for line in lines]
        assert mean(losses[-5:]) < 0.9 * mean(losses[:5]), f"{stage}: {losses}"
        assert (out / "run/checkpoints/latest").read_text() == f"global_step{STEPS}"
        weights = out
