"""The whole of mirage_ds in ten minutes on two CPU cores: a small model whose answers need its latents.

    python examples/demo.py --out runs/demo

Builds FrozenLake boards of levels 3 and 4 (28 px a cell), and trains a Qwen2.5-VL of 1.4 M parameters from nothing on
two ranks under ZeRO-3. It learns to read drawn paths, then to plan in stage1 and stage2. The last table shows how many
held-out boards it solves with its own latents, with another map's and with none, and how many text alone solves after
as many steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

BINARIES = Path(sys.executable).parent
READING_ROWS = Path(__file__).parent / "study2" / "reading_rows.py"
CELL_PX, SEED, TOGETHER = 28, 42, 50
LEARNS_TO_SEE = ("--train_vision", "--feature_cache", "off")
NAMES = {"own": "its own", "swap": "another map's", "off": "none"}
console = Console(highlight=False)


class Training(NamedTuple):
    """One training of the demo.

    Attributes:
        name: of its folder; start: the folder of its first model; rows: the folder of its records.
        learning_rate: at its peak.
    """

    name: str
    about: str
    stage: str
    start: str
    rows: str
    steps: int
    learning_rate: float
    options: tuple[object, ...] = ()


# see and read show another map's board: only the drawn path tells the answer. The others ask for a board's own path.
TRAININGS = (
    Training("see", "read a drawn path, a picture of the question", "sft", "nano", "shown", 150, 1.5e-3, LEARNS_TO_SEE),
    Training(
        *("read", "read a drawn path, as latents", "stage1", "see", "reading", 50, 1e-3),
        options=(*LEARNS_TO_SEE, "--train_targets", "--ce_weight", 20),
    ),
    Training("stage1", "plan: latents learn from the drawn path", "stage1", "read", "train", 40, 1e-3),
    Training("stage2", "plan: the model's own latents", "stage2", "stage1", "train", 220, 1e-3),
    Training("text", "plan: text alone, as many steps", "sft", "read", "train", 260, 1e-3),
)


def environment() -> dict[str, str]:
    """One thread a rank: two ranks share two cores. Commands are looked up beside this interpreter first."""
    defaults = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**defaults, **os.environ, "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}"}


def run(title: str, log: Path, *command: object) -> None:
    """Run a command with its progress on the terminal and its tables in a log; stop where it fails."""
    started = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run([str(word) for word in command], stdout=file, env=environment(), check=False).returncode
    if code:
        fail(title, code, log)
    console.print(f"{title}: {time.perf_counter() - started:.0f} s")


def fail(title: str, code: int, log: Path) -> None:
    """Show the end of a log and stop."""
    console.print(f"{title}: failed with exit code {code}; the end of {log}:")
    console.print("\n".join(log.read_text().splitlines()[-15:]), markup=False)
    sys.exit(code)


def train(one: Training, out: Path) -> None:
    """Train on two ranks, with a bar that follows the run's own log."""
    command = [
        *(BINARIES / "mirage-ds", "train", "--ranks", 2, "--stage", one.stage, "--model", out / one.start),
        *("--data_path", out / one.rows / "data.jsonl", "--save_model_path", out / one.name),
        *("--max_steps", one.steps, "--global_batch_size", 64, "--learning_rate", one.learning_rate),
        *("--adam_beta2", 0.98, "--lr_scheduler", "linear", "--warmup_steps", min(30, one.steps // 5)),
        *("--save_every", one.steps, "--feature_dir", out / "features"),
        # 1.4 M parameters leave room for every activation; a large model keeps checkpointing on.
        *("--no_gradient_checkpointing", *one.options),
    ]
    lines, log = out / one.name / "run" / "log.jsonl", out / "logs" / f"{one.name}.log"
    title = f"{one.name}: {one.about}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with log.open("w") as file, Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=one.steps)
        words = [str(word) for word in command]
        with subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment()) as process:
            while process.poll() is None:
                time.sleep(0.5)
                if lines.is_file():
                    bar.update(task, completed=lines.read_text().count("\n"))
    if process.returncode:
        fail(title, process.returncode, log)


def build(out: Path, count: int, test_count: int) -> None:
    """Build the records and the random model."""
    mirage, logs = BINARIES / "mirage-ds", out / "logs"
    style = ("--levels", "3,4", "--cell_size", CELL_PX, "--prompt", "short")
    planning = (mirage, "data", "build", "vsp-spatial-planning", *style)
    train, read, shown = out / "train" / "data.jsonl", out / "reading", out / "shown"
    drawn = ("--out", train.parent, "--count", count, "--proportions", "1,24")
    run(f"{count} boards with their path drawn", logs / "train.log", *planning, *drawn)
    held_out = ("--count", test_count, "--proportions", "1,4", "--split", "test")
    run(f"{test_count} held-out boards", logs / "test.log", *planning, "--out", out / "test", *held_out)
    join = (sys.executable, READING_ROWS, train, "--out", read)
    run("each drawn path beside another map's board", logs / "reading.log", *join)
    vary = (mirage, "data", "vary", "helper-input", read / "data.jsonl", "--out", shown)
    run("the same with the drawn path as a picture of the question", logs / "shown.log", *vary)
    model = ("--preset", "nano-untied", "--out", out / "nano", "--text", train)
    run("a random Qwen2.5-VL of 1.4 M parameters", logs / "nano.log", mirage, "init", *model)


def measure(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answer the held-out boards: with each kind of latents, and with text alone."""
    mirage, logs = BINARIES / "mirage-ds", out / "logs"
    (steps,) = (one.steps for one in TRAININGS if one.name == "stage2")
    last = out / "stage2" / "run" / "checkpoints" / f"global_step{steps}"
    run("export of the last sharded checkpoint", logs / "export.log", mirage, "export", last, out / "exported")
    given = ("--data_path", out / "test" / "data.jsonl", "--max_new_tokens", 48, "--batch_size", TOGETHER)
    how = ("--latents", ",".join(NAMES), "--seed", SEED, "--out", out / "controls.json")
    run("answers with each kind of latents", logs / "controls.log", mirage, "controls", out / "exported", *given, *how)
    plain = ("--no_latents", "--out", out / "text.json")
    run("answers with text alone", logs / "text_scores.log", mirage, "evaluate", out / "text", *given, *plain)
    return json.loads((out / "controls.json").read_text()), json.loads((out / "text.json").read_text())


def show(controls: dict[str, Any], text: dict[str, Any], test: Path) -> None:
    """Print the table, and what it says."""
    from mirage_ds.data.record_files import read_records
    from mirage_ds.study.collect import best_constant

    best = best_constant(read_records(test), None)
    table = Table("latents", "steps", f"solved of {len(best)} held-out boards", title="Do the latents matter?")
    steps = {one.name: one.steps for one in TRAININGS}
    base, planning = steps["see"] + steps["read"], steps["stage1"] + steps["stage2"]
    found = {name: controls["conditions"][name]["score"] for name in NAMES}
    for name, score in found.items():
        share = f"{score['mean']:.2f} ({score['low']:.2f}–{score['high']:.2f})"
        table.add_row(NAMES[name], f"{base} + {planning}", share)
    alone = text["all"]
    share = f"{alone['success']:.2f} ({alone['low']:.2f}–{alone['high']:.2f})"
    table.add_row("text alone", f"{base} + {steps['text']}", share)
    table.add_row("the best constant answer", "–", f"{sum(best) / len(best):.2f}")
    console.print(table)
    lost = controls["conditions"]["swap"]["score_difference"]
    depend = "depend" if lost["high"] < 0 else "do not depend"
    console.print(
        f"Another map's latents cost {-100 * lost['mean']:.0f} points ({-100 * lost['high']:.0f} to "
        f"{-100 * lost['low']:.0f}): this model's answers {depend} on what is in its latents. That latents carry the "
        f"answer does not show that they help: text alone solves {alone['success']:.2f}.\n"
        "One model and one seed; in brackets 95 % intervals."
    )


def clearest(answers: Sequence[dict[str, Any]], partners: Sequence[int]) -> int:
    """Return the place of an answer that is right, and with its partner's latents is the partner's answer."""

    def clearness(place: int) -> tuple[bool, bool, int]:
        own, swap, others = answers[place]["own"], answers[place]["swap"], answers[partners[place]]["own"]
        follows = swap["text"] == others["text"] != own["text"]
        return own["metrics"]["success"] and follows, others["metrics"]["success"], own["metrics"]["moves"]

    return max(range(len(answers)), key=clearness)


def draw(controls: dict[str, Any], test: Path, picture: Path) -> None:
    """Draw a board answered with its own latents and with another map's, and that map."""
    import matplotlib

    from mirage_ds.analysis.controls.conditions import choose_partners
    from mirage_ds.data.record_files import read_records
    from mirage_ds.tasks.boxed import last_boxed
    from mirage_ds.tasks.maps import follow, parse_board
    from mirage_ds.tasks.render import red_path, render
    from mirage_ds.tasks.vsp_planning import read_moves

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_records(test)
    boards = [parse_board(record.extra["map_desc"], str(test)) for record in records]
    answers = [one["conditions"] for one in controls["answers"]]
    partners = choose_partners(records, SEED)

    shown = clearest(answers, partners)
    other = partners[shown]
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.9), layout="constrained")
    panels = (
        (f"board {shown + 1}, with its own latents", shown, answers[shown]["own"]),
        (f"board {shown + 1}, with board {other + 1}'s latents", shown, answers[shown]["swap"]),
        (f"board {other + 1}, with its own latents", other, answers[other]["own"]),
    )
    for axis, (title, place, answer) in zip(axes, panels, strict=True):
        cells = follow(boards[place], read_moves(last_boxed(answer["text"]) or ""))
        axis.imshow(red_path(render(boards[place]), cells))
        axis.set(title=title, xticks=[], yticks=[], xlabel="solved" if answer["metrics"]["success"] else "not solved")
    figure.suptitle("Red: the path of the model's answer")
    figure.savefig(picture, dpi=120)


@click.command()
@click.option("--out", default="runs/demo", show_default=True, type=click.Path(path_type=Path))
@click.option("--count", default=5_000, show_default=True, help="Training boards.")
@click.option("--test_count", default=200, show_default=True, help="Held-out boards.")
def main(out: Path, count: int, test_count: int) -> None:
    """Run the demo into a new folder."""
    started = time.perf_counter()
    if out.exists():
        console.print(f"{out} exists already: remove it, or choose another --out")
        sys.exit(2)
    (out / "logs").mkdir(parents=True)
    test, picture = out / "test" / "data.jsonl", out / "latents.png"
    console.rule("data and a random model", align="left", style="dim")
    build(out, count, test_count)
    console.rule("training on two ranks", align="left", style="dim")
    for one in TRAININGS:
        train(one, out)
    console.rule(f"{test_count} held-out boards", align="left", style="dim")
    controls, text = measure(out)
    draw(controls, test, picture)
    show(controls, text, test)
    console.print(f"one board, two sets of latents   {picture}")
    console.print(f"the model                        {out}/exported")
    console.print(f"TensorBoard                      tensorboard --logdir {out}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
