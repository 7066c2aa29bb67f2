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

STEPS = 20


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Planning and reasoning records of the benchmark's picture size with the full prompt, and a nano model."""
    from mirage_ds.model.init import init_model
    from mirage_ds.tasks.board_task import BuildSpec
    from mirage_ds.tasks.build import build

    out = tmp_path_factory.mktemp("stages")
    build("vsp-spatial-planning", BuildSpec(out=out / "planning", count=100))
    build("vsp-spatial-reasoning", BuildSpec(out=out / "reasoning", count=100, answer="cot"))
    init_model("nano", out / "nano", texts=[out / "planning/data.jsonl", out / "reasoning/data.jsonl"])
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "stages"), [("planning", ("sft", "stage1", "stage2")), ("reasoning", ("stage1", "stage2"))]
)
def test_losses_fall_through_the_stages(folder: Path, task: str, stages: tuple[str, ...]) -> None:
    weights = folder / "nano"
    for stage in stages:
        out = folder / f"{task}-{stage}"
        finished = deepspeed(
            *("--model", folder / "nano", "--load_model_path", weights, "--stage", stage),
            *("--data_path", folder / task / "data.jsonl", "--save_model_path", out),
            *("--max_steps", STEPS, "--learning_rate", 1e-3, "--save_every", STEPS),
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "0 row(s) dropped" in finished.stdout
        lines = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        losses = [line["loss"] for line in lines]
        assert mean(losses[-5:]) < 0.9 * mean(losses[:5]), f"{stage}: {losses}"
        assert (out / "run/checkpoints/latest").read_text() == f"global_step{STEPS}"
        weights = out
