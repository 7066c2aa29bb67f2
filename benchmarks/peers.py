"""Plain SFT beside other trainers, by turns: ms-swift, LLaMA-Factory, TRL and transformers' own Trainer.

    python -m benchmarks.peers
    python -m benchmarks.peers --only ms-swift --rows 16 --features off --out peers.jsonl
    python -m benchmarks.peers --lock

All take the same rows in the same order, from the same weights of bench-87m, in float32, on two threads, with the tower
frozen, attention by torch's SDPA and torch's fused AdamW. Ours packs a step's rows, the others take them one at a time
and accumulate (--batch: so many padded). A trainer whose step is not running waits. `ratio` is a trainer's CPU-seconds
a row over ours in the same turn: the median of the turns.

Each trainer has an environment of its own (benchmarks/venvs.py; --lock renews its list). A trainer that cannot be
installed or started is left out with a sentence.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from benchmarks.scaling import Grid
from benchmarks.step import WARM_UP, Case, Ran, Side, Told, _rows_of_steps, described, run_config, spread
from benchmarks.venvs import LeftOut, build, lock
from benchmarks.workload import Workload, make_workload

# Trainer → its environment: transformers' Trainer runs in TRL's.
TRAINERS = {name: name for name in ("ms-swift", "llama-factory", "trl")} | {"transformers": "trl"}
# What a trainer may take until its first step, and a step on a busy machine.
PATIENCE_S = 900


class Peer:
    """Another trainer's process, told to step."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path):
        python = build(TRAINERS[name])
        self.kind, self.told, self.log = name, [], folder / f"{name}.log"
        self.pipe, theirs = Pipe()
        threads = str(settings["threads"])
        quiet = dict(
            OMP_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=""
        )
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
        command = [python, "-P", Path(__file__).with_name("peer_steps.py"), name, str(theirs.fileno())]
        command.append(json.dumps(settings | {"out": str(folder / name)}))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=folder, pass_fds=[theirs.fileno()]
            )
        theirs.close()
        self.is_ = self._hear()

    def _hear(self) -> Any:
        try:
            if self.pipe.poll(PATIENCE_S):
                return self.pipe.recv()
        except EOFError:
            pass
        self.process.terminate()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        raise LeftOut(lines[-1] if lines else "it ended without a word")

    def step(self, number: int) -> None:
        """Take a step."""
        del number
        self.pipe.send("step")
        self.told.append(Told(*self._hear()))

    def end(self) -> Ran:
        """End the process."""
        self.pipe.send(None)
        peak = self._hear()
        self.process.wait()
        return Ran(self.told[WARM_UP:], 0.0, peak)


def write_rows(work: Workload, case: Case, steps: int, out: Path) -> Path:
    """Write the rows of the steps as conversations, in the order in which ours takes them."""
    records = [json.loads(line) for line in work.records.read_text().splitlines()]
    with out.open("w") as file:
        for rows in _rows_of_steps(case, len(records), steps):
            for one in (records[row] for row in rows):
                # sft has no latents.
                answer = one["text_output"].replace("<output_image>", "")
                messages = [
                    {"role": "user", "content": one["text_input"]}, {"role": "assistant", "content": answer},
                ]  # fmt: skip
                images = [str(work.records.parent / one["image_input"])]
                file.write(json.dumps({"messages": messages, "images": images}) + "\n")
    return out


def measured(
    case: Case, names: Sequence[str], batch: int, repeats: int, folder: Path, console: Console
) -> dict[str, Any]:
    """Let ours and the others step by turns."""
    folder.mkdir()
    steps = WARM_UP + repeats
    work = make_workload(folder / "work", case.preset, min(512, steps * case.rows), case.source, case.seed)
    ours = Side("product", case, work, folder / "ours", steps)
    own = run_config(case, work, folder / "ours", steps)
    settings = dict(
        model=str(work.model), records=str(write_rows(work, case, steps, folder / "rows.jsonl")), rows=case.rows,
        batch=min(batch, case.rows), threads=case.threads, checkpointing=case.checkpointing,
        learning_rate=own.learning_rate, weight_decay=own.weight_decay, max_grad_norm=own.max_grad_norm,
        adam_beta2=own.adam_beta2,
    )  # fmt: skip
    sides: list[Any] = [ours]
    for name in names:
        try:
            sides.append(Peer(name, settings, folder))
        except LeftOut as why:
            console.print(f"{name} is left out: {why}", markup=False)
    for number in track(range(steps), f"{case.rows} rows", console=console, transient=True):
        for side in sides:
            side.step(number)
    ran = {side.kind: side.end() for side in sides}
    mine = ran["product"].told
    found: dict[str, Any] = described(case) | {
        "batch": settings["batch"],
        "tokens": [min(ours.tokens), max(ours.tokens)],
    }
    for side in sides:
        one = ran[side.kind]
        found[side.kind] = {
            "cpu_seconds_per_row": spread([told.cpu_seconds / case.rows for told in one.told]),
            "ratio": spread([told.cpu_seconds / own.cpu_seconds for told, own in zip(one.told, mine, strict=True)], 3),
            "peak_memory_gb": round(one.memory / 1e9, 3),
            "losses": [round(told.loss, 4) for told in one.told],
            **getattr(side, "is_", {}),
        }
    return found


def table(lines: Sequence[dict[str, Any]]) -> Grid:
    """Show a line a trainer and number of rows."""
    rows = []
    for line in lines:
        for name, one in line.items():
            if isinstance(one, dict):
                seconds, ratio = one["cpu_seconds_per_row"], one["ratio"]
                rows.append([
                    str(line["rows"]), "mirage-ds" if name == "product" else name, f"{seconds['median']:.2f}",
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})", f"{one['peak_memory_gb']:.2f}",
                    f"{one['losses'][-1]:.3f}",
                ])  # fmt: skip
    columns = ["rows a step", "", "CPU-seconds a row", "over ours", "peak memory, GB", "last loss"]
    return Grid("Plain SFT, by turns", columns, rows)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(TRAINERS)), help="Several times: these.")
@click.option(
    "--rows", default=[1, 4, 16], show_default=True, multiple=True, help="An optimizer step's; several times."
)
@click.option("--batch", default=1, show_default=True, help="Rows that the others pad and take at a time.")
@click.option("--preset", default="bench-87m", show_default=True)
@click.option("--micro_tokens", default=8192, show_default=True, help="Tokens that ours packs at most.")
@click.option("--micro_rows", type=int, help="Rows that ours packs at most.")
@click.option("--features", default="all", show_default=True, type=click.Choice(["all", "off"]),
              help="off: our tower runs in every step too.")  # fmt: skip
@click.option("--zero", default=0, show_default=True, type=click.IntRange(0, 3), help="Our ZeRO stage.")
@click.option("--checkpointing", is_flag=True, help="All recompute layers in backward.")
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Turns that are counted.")
@click.option("--out", type=click.Path(path_type=Path), help="Append a JSON line a number of rows to this file.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--lock", "renew", is_flag=True, help="Renew the lists of the environments, and nothing else.")
def main(
    only: tuple[str, ...], rows: tuple[int, ...], batch: int, repeats: int, out: Path | None, markdown: bool,
    renew: bool, **settings: Any,
) -> None:  # fmt: skip
    """Compare plain SFT with other trainers; print a table."""
    if renew:
        for name in set(TRAINERS.values()):
            lock(name)
        return
    os.environ |= dict(DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(settings["threads"]))
    console, lines = Console(stderr=True), []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mirage-peers-") as name:
        for count in rows:
            case = Case(
                **settings, stage="sft", source="vsp", latent_size=4, rows=count, dtype="fp32",
                ranks=1, plain_rows=1, seed=0, device="cpu", kernels=None,
            )  # fmt: skip
            found = measured(case, only or list(TRAINERS), batch, repeats, Path(name) / str(count), console)
            lines.append(found)
            if out:
                with out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    grid = table(lines)
    Console(width=120).print(f"\n{grid.markdown()}" if markdown else grid.rich(), markup=False)
    console.print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
