"""The host's time in an optimizer step: a model of real depth whose layers are so small that only the host works.

    python -m benchmarks.host
    python -m benchmarks.host --layers 80 --only stage2 --ranks 1
    git worktree add ../before b24ddd1 && python -m benchmarks.host --against ../before

On a GPU the host asks for every operator, and a step takes at least as long as it needs for that. Here a step is one
micro-step of four short rows in float32 on the CPU, with the trainer's own step, the shipped recipes as they run on a
CPU, DeepSpeed's engine and AdamW. The recipes of a stage step by turns, each in processes of its own. Then each takes a
step under sys.setprofile and one under a dispatch mode, which count its calls of Python functions and its operators.

--against takes a checkout of the commit before the layers were called as a whole. Its stage2 with k = 4 and its sft,
with its own ZeRO-1 recipes, then take their turns too, and the targets are printed. They are judged by the host's time:
processor time of the thread that trains. Gloo's threads stand for a network, and other programs are not in it.

k latents a run.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.scaling import Grid
from benchmarks.step import ROOT, described
from mirage_ds.cluster.here import free_ports

RECIPES = ("zero0", "zero1", "zero2", "zero3", "zero3_kept")
STAGES = (("sft", 0), ("stage1", 4), ("stage2", 1), ("stage2", 4), ("stage2", 8))
# How far the medians of two equal sides may lie apart.
NOISE = 0.05
# What --against runs of the other checkout.
BEFORE = {("sft", 0): "sft_zero1_cpu", ("stage2", 4): "stage2_zero1_cpu"}
# recipe → its time over that.
MOST = {"sft": {"zero1": 1 + NOISE}, "stage2": {"zero3_kept": 1.3, "zero3": 2.5}}
ROWS = 4
# More elements than a vector of the model here has, fewer than a matrix.
VECTOR = 1000
# Steps that no median counts: DeepSpeed records its trace in the first and looks through it in the second.
WARM_UP = 2
COUNTS = ("python_calls", "operators")
# A rank's start, and a step at 80 layers, on a busy machine.
PATIENCE_S = 900


@dataclass(frozen=True, order=True)
class Case:
    """What is run.

    Attributes:
        before: it is the other checkout's.
        recipe: a JSON of its ds_configs, or zero0.
    """

    layers: int
    ranks: int
    stage: str
    latent_size: int
    recipe: str
    before: bool = False

    @property
    def label(self) -> str:
        """What takes turns with it has the same."""
        latents = f", k = {self.latent_size}" if self.stage == "stage2" else ""
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.stage}{latents}"


@dataclass
class Found:
    """What a case came to, step by step, of the slowest rank.

    Attributes:
        host_seconds, cpu_seconds: processor time of the thread that trains, and of its process.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    python_calls: int = 0
    operators: int = 0

    def median(self, name: str = "host_seconds") -> float:
        """Return the median step."""
        return statistics.median(getattr(self, name)[WARM_UP:])

    def slowest(self, last: int | None = None) -> float:
        """Return the slowest step from the second on, over the median."""
        return max(self.host_seconds[1:last]) / self.median()


class Target(NamedTuple):
    """What is wanted: at most `most`."""

    what: str
    found: float
    most: float


def make_model(layers: int, out: Path) -> tuple[Path, Path]:
    """Write a model folder of so many layers and the records of a step: a picture of 56 px, a helper of 112."""
    import numpy as np
    from PIL import Image

    from mirage_ds.model.init import init_model
    from mirage_ds.model.presets import PRESETS, preset

    random, records = np.random.default_rng(0), out / "data.jsonl"
    lines = []
    for number in range(2 * ROWS):
        for name, side in (("in", 56), ("out", 112)):
            noise = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(out / f"{name}{number}.png")
        lines.append({
            "text_input": "<image>How many?", "text_output": f"<output_image>It is {number}.",
            "image_input": f"in{number}.png", "image_output": f"out{number}.png",
        })  # fmt: skip
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = preset("nano")
    shape["text_config"] |= dict(
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=layers
    )
    shape["vision_config"]["out_hidden_size"] = 64
    with mock.patch.dict(PRESETS, host=shape):
        init_model("host", out / "model", texts=[records])
    return out / "model", records


class Tree:
    """A checkout: a process that has imported it and forks ranks (benchmarks/host_steps.py)."""

    def __init__(self, checkout: Path, folder: Path, name: str):
        self.checkout, self.folder, self.address = checkout, folder, str(folder / f"{name}.socket")
        self.name = name
        git = ["git", "describe", "--always", "--dirty"]
        self.commit = subprocess.run(git, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()
        environment = dict(
            PYTHONPATH=str(checkout), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
            PYTHONWARNINGS="ignore",
        )  # fmt: skip
        script = Path(__file__).with_name("host_steps.py")
        self.process = subprocess.Popen([sys.executable, "-P", script, self.address], env=os.environ | environment)

    def ask(self, environment: dict[str, str], settings: dict[str, Any]) -> Any:
        """Fork a process and tell it what it is; return the pipe to it."""
        waited = time.monotonic() + PATIENCE_S
        while True:
            try:
                pipe = Client(self.address)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None or time.monotonic() > waited:
                    sys.exit(f"{self.checkout}: its processes do not start")
                time.sleep(0.2)
        pipe.send((environment, settings))
        return pipe

    def recipe(self, name: str) -> Path:
        """Return the path of a recipe; zero0 is not shipped, and zero3 keeps vectors, as it does of the public models.

        Of a small model on a CPU it would keep nothing.
        """
        if name not in ("zero0", "zero3"):
            return self.checkout / "ds_configs" / f"{name}.json"
        values: dict[str, Any] = {"zero_optimization": {"stage": 0}}
        if name == "zero3":
            from mirage_ds.engine.ds_config import read_json

            values = read_json(ROOT / "ds_configs/zero3.json", "cpu")
            values["zero_optimization"]["stage3_param_persistence_threshold"] = VECTOR
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(values))
        return path


def hear(pipe: Any, who: object) -> Any:
    """Receive an answer."""
    try:
        if pipe.poll(PATIENCE_S):
            return pipe.recv()
    except EOFError:
        pass
    sys.exit(f"{who}: a process failed or hangs")


class Side:
    """The ranks of a case."""

    def __init__(self, case: Case, tree: Tree, model: Path, records: Path, steps: int):
        self.case, self.found = case, Found()
        settings = dict(
            model=str(model), stage=case.stage, data_path=str(records), latent_size=case.latent_size or 4,
            save_model_path=tree.folder / "runs" / "_".join(map(str, asdict(case).values())), overwrite=True,
            global_batch_size=ROWS * case.ranks, max_steps=steps, epochs=1000, warmup_steps=0, num_workers=0,
            lr_scheduler="constant", feature_cache="all", cache_dir=tree.folder / f"cache-{tree.name}",
            deepspeed=tree.recipe(case.recipe), report_to=["none"],
        )  # fmt: skip
        place = dict(WORLD_SIZE=case.ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_ports())
        self.pipes = []
        for rank in range(case.ranks):
            own = {key: str(value) for key, value in (place | dict(RANK=rank, LOCAL_RANK=rank)).items()}
            self.pipes.append(tree.ask(own, settings))
        self.all()

    def all(self, asked: str | None = None) -> list[Any]:
        """Ask all ranks; return their answers."""
        for pipe in self.pipes:
            if asked:
                pipe.send(asked)
        return [hear(pipe, self.case) for pipe in self.pipes]

    def step(self) -> None:
        """Take a step."""
        losses, *clocks = zip(*self.all("step"), strict=True)
        self.found.losses.append(round(losses[0], 6))
        for told, ranks in zip(
            (self.found.seconds, self.found.host_seconds, self.found.cpu_seconds), clocks, strict=True
        ):
            told.append(round(max(ranks), 4))

    def end(self) -> Found:
        """Take the steps that count, and end."""
        self.found.python_calls, self.found.operators = (max(self.all(name)) for name in COUNTS)
        for pipe in self.pipes:
            pipe.send(None)
            pipe.close()
        return self.found


def cases(layers: int, ranks: int, stage: str, k: int, against: bool) -> Iterator[Case]:
    """List what takes turns."""
    for recipe in RECIPES:
        yield Case(layers, ranks, stage, k, recipe)
    if against and (stage, k) in BEFORE:
        yield Case(layers, ranks, stage, k, BEFORE[stage, k], before=True)


def targets(found: dict[Case, Found], thin: list[float]) -> Iterator[Target]:
    """Say what is wanted of this checkout's cases, and beside the other's."""
    slowest, case = max((one.slowest(), case) for case, one in found.items() if not case.before)
    yield Target(f"a step from the second on, over the median (most in {case.label}, {case.recipe})", slowest, 3.0)
    for before, old in found.items():
        for recipe, most in MOST[before.stage].items() if before.before else ():
            new = found[replace(before, recipe=recipe, before=False)]
            yield Target(
                f"{before.label}, {recipe}, over the other checkout's ZeRO-1", new.median() / old.median(), most
            )
    if len(thin) > 1:
        yield Target("operators of a thin pass and layer, over the other checkout's", thin[0] / thin[1], 0.5)


def grids(found: dict[Case, Found]) -> Iterator[Grid]:
    """Show the cases: a row for what takes turns, a column for each recipe."""
    cells: dict[str, Callable[[Found], str]] = {
        "Seconds of a step, processor seconds of its process": lambda one: (
            f"{one.median('seconds'):.2f}, {one.median('cpu_seconds'):.2f}"
        ),
        "The host's seconds of a step (the slowest of steps 2 to 5, over that)": lambda one: (
            f"{one.median():.2f} ({one.slowest(5):.1f})"
        ),
        "Calls of Python functions, operators, in thousands": lambda one: (
            f"{one.python_calls / 1000:.0f}, {one.operators / 1000:.1f}"
        ),
    }
    columns = [*RECIPES, *["zero1, before"] * any(case.before for case in found)]
    for title, cell in cells.items():
        rows: dict[str, list[str]] = {}
        for case, one in found.items():
            row = rows.setdefault(case.label, ["–"] * len(columns))
            row[-1 if case.before else RECIPES.index(case.recipe)] = cell(one)
        yield Grid(title, ["", *columns], [[label, *row] for label, row in rows.items()])


def take_turns(sides: list[Side], steps: int, progress: Progress) -> dict[Case, Found]:
    """Let the sides step one after another."""
    task = progress.add_task(sides[0].case.label, total=steps * len(sides))
    for _ in range(steps):
        for side in sides:
            side.step()
            progress.advance(task)
    return {side.case: side.end() for side in sides}


@click.command()
@click.option(
    "--layers", default=28, show_default=True, help="Decoder layers: 28, 36, 64 and 80 are the public models'."
)
@click.option("--ranks", default=[1, 2], show_default=True, multiple=True, help="Several times: one after the other.")
@click.option("--only", type=click.Choice(["sft", "stage1", "stage2"]), help="One stage.")
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
              help="A checkout of b24ddd1.")  # fmt: skip
@click.option("--steps", default=12, show_default=True, type=click.IntRange(5), help="Of each case.")
@click.option("--out", type=click.Path(path_type=Path), help="Append a JSON line a case to this file.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def main(
    layers: int,
    ranks: tuple[int, ...],
    only: str | None,
    against: Path | None,
    steps: int,
    out: Path | None,
    markdown: bool,
) -> None:
    """Time steps whose work is the host's; print tables and whether the targets are met."""
    # Asked to end, it ends its processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    console = Console(width=140)
    found: dict[Case, Found] = {}
    told: dict[Case, dict[str, Any]] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="mirage-host-") as name,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        folder = Path(name)
        model, records = make_model(layers, folder)
        trees = [Tree(ROOT, folder, "this"), *([Tree(against, folder, "before")] if against else [])]
        try:
            counted = dict(model=model, records=records, rows=ROWS)
            thin = [round(hear(tree.ask({}, counted), tree.checkout), 1) for tree in trees]
            for size, (stage, k) in product(ranks, STAGES):
                if only in (None, stage):
                    chosen = list(cases(layers, size, stage, k, against is not None))
                    told |= {case: described(case) | dict(commit=trees[case.before].commit) for case in chosen}
                    sides = [Side(case, trees[case.before], model, records, steps + len(COUNTS)) for case in chosen]
                    found |= take_turns(sides, steps, bar)
        finally:
            for tree in trees:
                tree.process.terminate()
    if out:
        with out.open("a") as file:
            for case, one in found.items():
                file.write(json.dumps(told[case] | dict(thin_operators=thin[case.before], **asdict(one))) + "\n")
    for grid in grids(found):
        console.print(f"\n**{grid.title}**\n\n{grid.markdown()}" if markdown else grid.rich())
    console.print("operators that a pass of a token a row adds to a layer, as on a GPU:", *thin)
    for target in targets(found, thin):
        right = "right" if target.found <= target.most else "wrong"
        console.print(f"{right}  {target.what}: {target.found:.2f}, at most {target.most:g}")


if __name__ == "__main__":
    main()
