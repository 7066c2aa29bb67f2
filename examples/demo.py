"""The whole of mirage_ds in a few minutes on two CPU cores: data, a small model, three stages, export, evaluation.

    python examples/demo.py --out runs/demo

Builds VSP planning maps of levels 3 and 4 (real FrozenLake boards, pictures of 28 px a cell instead of the benchmark's
64), trains a 1.3 M-parameter Qwen2.5-VL from nothing through sft → stage1 → stage2 with `deepspeed` on two ranks under
ZeRO-3, and scores each stage on held-out maps. It shows that the parts work together; it is no comparison of methods:
each stage goes on from the one before, so later rows have seen more steps.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

BINARIES = Path(sys.executable).parent
LEVELS = (3, 4)
console = Console(highlight=False)


class Stage(NamedTuple):
    """One stage of the demo: optimizer steps, rows a step, peak learning rate."""

    name: str
    steps: int
    rows: int
    learning_rate: float


STAGES = (
    Stage("sft", 600, 64, 1.5e-3),
    Stage("stage1", 32, 64, 5e-4),
    Stage("stage2", 150, 64, 1e-3),
)


def run(title: str, command: Sequence[object]) -> None:
    """Run a command, which shows its own progress; stop where it fails."""
    started = time.perf_counter()
    console.rule(title, align="left", style="dim")
    code = subprocess.run([str(word) for word in command], env=environment(), check=False).returncode
    if code:
        console.print(f"{title} failed with exit code {code}")
        sys.exit(code)
    console.print(f"{time.perf_counter() - started:.0f} s", style="dim")


def environment() -> dict[str, str]:
    """One thread a rank: two ranks share two cores. Commands are looked up beside this interpreter first."""
    defaults = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**defaults, **os.environ, "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}"}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train(stage: Stage, weights: Path, out: Path, data: Path, log: Path) -> None:
    """Train one stage on two ranks, with a bar that follows the run's own log."""
    command = [
        *(BINARIES / "deepspeed", "--num_accelerators", 2, "--master_port", free_port()),
        *("--module", "mirage_ds.train", "--stage", stage.name, "--model", weights, "--data_path", data),
        *("--save_model_path", out, "--max_steps", stage.steps, "--global_batch_size", stage.rows),
        *("--learning_rate", stage.learning_rate, "--adam_beta2", 0.98, "--lr_scheduler", "linear"),
        *("--warmup_steps", min(50, stage.steps // 5), "--save_every", stage.steps),
        *("--feature_dir", out.parent / "features"),
        # 1.3 M parameters leave room for every activation; a large model keeps checkpointing on.
        "--no_gradient_checkpointing",
    ]
    lines = out / "run" / "log.jsonl"
    console.rule(f"training {stage.name}", align="left", style="dim")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with log.open("w") as file, Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("reading rows, encoding images", total=None)
        words = [str(word) for word in command]
        with subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment()) as process:
            while process.poll() is None:
                time.sleep(0.5)
                if lines.is_file() and (done := lines.read_text().count("\n")):
                    bar.update(task, description="optimizer steps", completed=done, total=stage.steps)
    if process.returncode:
        console.print(f"training {stage.name} failed with exit code {process.returncode}; the end of {log}:")
        console.print("\n".join(log.read_text().splitlines()[-15:]), markup=False)
        sys.exit(process.returncode)


def losses(folder: Path) -> tuple[list[int], list[float]]:
    """Read the steps and cross-entropies of a run."""
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [record["step"] for record in records], [record["ce"] for record in records]


def draw(out: Path, stages: Sequence[Stage]) -> Path:
    """Draw the cross-entropy of all stages, one behind the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    start = 0
    # Okabe and Ito's colours, told apart by colour-blind readers too.
    for stage, colour in zip(stages, ("#0072B2", "#E69F00", "#009E73"), strict=True):
        steps, values = losses(out / stage.name)
        axes.plot([start + step for step in steps], values, color=colour, linewidth=1, label=stage.name)
        start += len(steps)
    axes.set(xlabel="optimizer steps, all stages", ylabel="cross-entropy per row", yscale="log")
    axes.set_title("VSP planning, levels 3 and 4: sft → stage1 → stage2")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = out / "loss.png"
    figure.savefig(picture, dpi=120)
    return picture


def best_constant(boards: Sequence[Any], longest: int = 6) -> tuple[list[str], float]:
    """Find the one answer that solves most boards: what a model scores that never looks at the map.

    Args:
        longest: moves of the answer at most; every one of the 4 + 16 + … answers is tried.

    Returns:
        The moves, and the share of boards they solve.
    """
    from mirage_ds.tasks.maps import GOAL, HOLE, MOVES, START, find, step, tile

    best: tuple[list[str], int] = ([], 0)

    def extend(moves: list[str], places: list[tuple[Any, tuple[int, int]]]) -> None:
        nonlocal best
        # Only boards on which no hole was met are still here.
        solved = sum(tile(board, cell) == GOAL for board, cell in places)
        if moves and solved > best[1]:
            best = (moves, solved)
        if len(moves) < longest:
            for move in MOVES:
                after = [(board, step(board, cell, move)) for board, cell in places]
                extend([*moves, move], [(board, cell) for board, cell in after if tile(board, cell) != HOLE])

    extend([], [(board, find(board, START)) for board in boards])
    return best[0], best[1] / max(1, len(boards))


def constant_scores(test: Path) -> dict[str, tuple[float, int]]:
    """Score the best answer that never looks at the map, per level; with the number of maps."""
    from mirage_ds.tasks.maps import parse_board

    boards: dict[str, list] = {}
    for line in test.read_text().splitlines():
        board = parse_board(json.loads(line)["map_desc"], str(test))
        boards.setdefault(str(len(board)), []).append(board)
    return {level: (best_constant(found)[1], len(found)) for level, found in boards.items()}


def score(folder: Path, test: Path, latents: bool, title: str) -> dict[str, Any]:
    """Answer the held-out maps and score the answers, as `mirage-ds evaluate` does."""
    from functools import partial

    from mirage_ds.data.images import ImageFinder
    from mirage_ds.evaluate.decoder import load_decoder
    from mirage_ds.evaluate.report import evaluate_file, write_report
    from mirage_ds.evaluate.spec import EvaluateSpec

    decoder = load_decoder(folder, ImageFinder.beside(test, None), latents=latents)
    bar = partial(track, description=title, console=console)
    scores = evaluate_file(decoder, EvaluateSpec(data_path=test, max_new_tokens=48, batch_size=50), bar)
    write_report(scores, folder / "scores.json")
    return scores


def show_answers(folder: Path, test: Path, scores: dict[str, Any]) -> None:
    """Ask two maps again, one that the model solves and one that it does not, and print the answers whole."""
    from mirage_ds import load

    model = load(folder)
    records = [json.loads(line) for line in test.read_text().splitlines()]
    for title, solved in (("the longest way that it finds", True), ("the longest way that is wrong", False)):
        found = [one for one in scores["answers"] if one["metrics"]["success"] is solved]
        if not found:
            continue
        at = max(found, key=lambda one: one["metrics"]["moves"])["row"]
        record, picture = records[at], test.parent / records[at]["image_input"]
        answer = model.generate(record["text_input"], [picture], max_new_tokens=48)
        console.rule(title, align="left", style="dim")
        for name, text in (
            ("question", record["text_input"]),
            ("picture", picture),
            ("answer", answer.marked),
            ("a right one", record["text_output"]),
        ):
            # A terminal that finds a picture's path in one piece can open it.
            console.print(f"{name:14}{str(text).strip()}", markup=False, soft_wrap=True)


@click.command()
@click.option("--out", default="runs/demo", show_default=True, type=click.Path(path_type=Path))
@click.option("--count", default=10_000, show_default=True, help="Training maps.")
@click.option("--test_count", default=200, show_default=True, help="Held-out maps.")
def main(out: Path, count: int, test_count: int) -> None:
    """Run the demo into a new folder."""
    started = time.perf_counter()
    if out.exists():
        console.print(f"{out} exists already: remove it, or choose another --out")
        sys.exit(2)
    logs = out / "logs"
    logs.mkdir(parents=True)
    mirage = BINARIES / "mirage-ds"
    build = (mirage, "data", "build", "vsp-spatial-planning", "--levels", "3,4")
    style = ("--cell_size", 28, "--prompt", "short")
    train_data, test_data = out / "train" / "data.jsonl", out / "test" / "data.jsonl"
    arguments = ("--out", out / "train", "--count", count, "--proportions", "1,24", *style)
    run(f"building {count} training maps", (*build, *arguments))
    arguments = ("--out", out / "test", "--count", test_count, "--proportions", "1,4", "--split", "test", *style)
    run(f"building {test_count} held-out maps", (*build, *arguments))
    arguments = ("--preset", "nano", "--out", out / "nano", "--text", train_data)
    run("a random Qwen2.5-VL of 1.3 M parameters", (mirage, "init", *arguments))

    weights = out / "nano"
    for stage in STAGES:
        train(stage, weights, out / stage.name, train_data, logs / f"{stage.name}.log")
        weights = out / stage.name
    exported = out / "exported"
    checkpoint = weights / "run" / "checkpoints" / f"global_step{STAGES[-1].steps}"
    run("export of the last sharded checkpoint", (mirage, "export", checkpoint, exported))

    console.rule(f"answering {test_count} held-out maps", align="left", style="dim")
    table = Table(
        "after", "steps so far", *(f"level {level}" for level in LEVELS), "all", title="success on held-out maps"
    )
    constant = constant_scores(test_data)
    mean = sum(share * count for share, count in constant.values()) / test_count
    table.add_row("best constant answer", "–", *(f"{constant[str(level)][0]:.2f}" for level in LEVELS), f"{mean:.2f}")
    steps = 0
    for stage in STAGES:
        steps += stage.steps
        folder = exported if stage is STAGES[-1] else out / stage.name
        scores = score(folder, test_data, latents=stage.name != "sft", title=stage.name)
        rows = [scores["levels"][str(level)] for level in LEVELS] + [scores["all"]]
        cells = [f"{row['success']:.2f} ({row['low']:.2f}–{row['high']:.2f})" for row in rows]
        table.add_row(stage.name, str(steps), *cells)
    picture = draw(out, STAGES)
    console.print(table)
    console.print(
        "A smoke test of the parts, no comparison of methods: each row goes on from the one above and has seen more "
        "steps. Real maps at 28 px a cell, not the benchmark's picture size; in brackets Wilson's 95 % interval."
    )
    show_answers(exported, test_data, scores)
    console.rule(style="dim")
    console.print(f"run folders   {out}/sft, stage1, stage2 (settings, logs and checkpoints in run/)")
    console.print(f"final model   {exported}")
    console.print(f"TensorBoard   tensorboard --logdir {out}")
    console.print(f"loss curves   {picture}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
