"""Train a small model whose latents say which path, and ask by controls whether its answers follow them.

    python examples/controls.py --out runs/controls

Planning maps of levels 3 and 4. Where several paths are shortest, the one that a record's answer and helper picture
show is drawn (`--ties random`), so the picture of the question does not tell it. Then sft → stage1 → stage2 on two
ranks, and `mirage-ds controls` on held-out maps after stage1 and after stage2: replaced latents, and two-path
interchange. docs/controls.md has the tables and what they say.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from demo import BINARIES, Stage, console, run, train

STAGES = (
    Stage("sft", 400, 64, 1.5e-3),
    Stage("stage1", 600, 64, 1e-3),
    Stage("stage2", 200, 64, 5e-4),
)


@click.command()
@click.option("--out", default="runs/controls", show_default=True, type=click.Path(path_type=Path))
@click.option("--count", default=10_000, show_default=True, help="Training maps.")
@click.option("--test_count", default=400, show_default=True, help="Held-out maps.")
def main(out: Path, count: int, test_count: int) -> None:
    """Run it into a new folder."""
    started = time.perf_counter()
    if out.exists():
        console.print(f"{out} exists already: remove it, or choose another --out")
        sys.exit(2)
    (out / "logs").mkdir(parents=True)
    mirage = BINARIES / "mirage-ds"
    build = (mirage, "data", "build", "vsp-spatial-planning", "--levels", "3,4")
    style = ("--cell_size", 28, "--prompt", "short", "--ties", "random")
    train_data, test_data = out / "train" / "data.jsonl", out / "test" / "data.jsonl"
    # There are only some 440 different records of level 3.
    training = ("--out", out / "train", "--count", count, "--proportions", "1,24")
    run(f"building {count} training maps", (*build, *training, *style))
    held_out = ("--out", out / "test", "--count", test_count, "--proportions", "1,9", "--split", "test")
    run(f"building {test_count} held-out maps", (*build, *held_out, *style))
    initial = ("--preset", "nano", "--out", out / "nano", "--text", train_data)
    run("a random Qwen2.5-VL of 1.3 M parameters", (mirage, "init", *initial))
    weights = out / "nano"
    for stage in STAGES:
        train(stage, weights, out / stage.name, train_data, out / "logs" / f"{stage.name}.log")
        weights = out / stage.name
    for name in ("stage1", "stage2"):
        files = ("--out", out / f"{name}.json", "--markdown", out / f"{name}.md")
        wanted = ("--latents", "own,first,zero,random,matched,swap,oracle,off,text,path", "--max_new_tokens", 48)
        compared = (mirage, "controls", weights.parent / name, "--data_path", test_data, *wanted, *files)
        run(f"controls after {name}", compared)
    console.print(f"{time.perf_counter() - started:.0f} s in all; tables: {out}/stage1.md, {out}/stage2.md")


if __name__ == "__main__":
    main()
