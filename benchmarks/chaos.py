"""Kill training at random moments, damage what it left, start it again; the end must equal an undisturbed run.

    python -m benchmarks.chaos --kills 20 --out runs/chaos

Two ranks under ZeRO-3 on the CPU train a nano model on a few maps. One run is left alone. The other is killed (SIGKILL
to launcher, ranks and workers together) during a step, a save, the first load or an evaluation; the run's own
events.jsonl says in which. Every other start, and the last, writes its checkpoints beside the steps (--async_save).
Between two starts the newest checkpoint is sometimes damaged, and sometimes the run may write no file above a size, as
when a quota is used up. At the end weights, losses and the rows of every step are compared.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

BINARIES = Path(sys.executable).parent
PHASES = ("load", "step", "save", "evaluation")
SAVE_EVERY, EVAL_EVERY = 2, 3
# Checkpoint shards of nano are larger than this, everything else that a run writes is smaller.
QUOTA_BYTES = 400_000
LIMIT_S = 240


class Kill(NamedTuple):
    """One kill: what was aimed at, what the run was doing, how far it was, what was done to its files afterwards."""

    aimed: str
    phase: str
    step: int
    seconds: float
    damage: str


def environment() -> dict[str, str]:
    """One thread a rank; nothing of a launcher's that runs this."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    kept["PATH"] = f"{BINARIES}{os.pathsep}{kept['PATH']}"
    return {**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def make_inputs(out: Path) -> None:
    """Build the maps and the model."""
    build = (BINARIES / "mirage-ds", "data", "build", "vsp-spatial-planning", "--prompt", "short", "--cell_size", 28)
    model = (BINARIES / "mirage-ds", "init", "--preset", "nano", "--out", out / "nano")
    for command in (
        (*build, "--levels", "3,4", "--count", 30, "--out", out / "data"),
        (*build, "--levels", "3,4", "--count", 8, "--split", "test", "--out", out / "held_out"),
        (*model, "--text", out / "data/data.jsonl"),
    ):
        words = [str(word) for word in command]
        subprocess.run(words, env=environment(), check=True, stdout=subprocess.DEVNULL)


def start(
    out: Path, run: Path, log: Path, steps: int, quota: bool = False, beside: bool = False
) -> subprocess.Popen[bytes]:
    """Start the training command of a run; it continues where it can. `beside`: with --async_save."""
    command = [
        *(BINARIES / "deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "--module", "mirage_ds.train"),
        *("--stage", "stage2", "--model", out / "nano", "--data_path", out / "data/data.jsonl", "--latent_size", 2),
        *("--save_model_path", run, "--resume", "auto", "--max_steps", steps, "--global_batch_size", 5),
        *("--micro_batch_size", 2, "--learning_rate", 1e-3, "--save_every", SAVE_EVERY, "--keep_checkpoints", 3),
        *("--eval_data_path", out / "held_out/data.jsonl", "--eval_every", EVAL_EVERY, "--num_workers", 1),
        *("--feature_dir", out / "features", "--log_rows", "--report_to", "none", "--no_gradient_checkpointing"),
        *(["--async_save"] if beside else []),
    ]

    # prlimit belongs to util-linux, which every Linux has.
    words = ["prlimit", f"--fsize={QUOTA_BYTES}", *command] if quota else command
    with log.open("ab") as file:
        return subprocess.Popen(
            [str(word) for word in words],
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a JSON-lines file; a line that is being written is left out."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def phase_of(events: list[dict[str, Any]]) -> str:
    """Say what a run was doing, by its last event."""
    last = events[-1]["event"] if events else "load begins"
    begun = (" begins", " goes on")
    return last.removesuffix(begun[0]).removesuffix(begun[1]) if last.endswith(begun) else "step"


def kill(process: subprocess.Popen[bytes]) -> None:
    """End launcher, ranks and workers at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def strike(process: subprocess.Popen[bytes], run: Path, aim: str, chance: random.Random) -> tuple[str, int] | None:
    """Wait until the run does what is aimed at, and kill it there.

    Returns:
        What it was doing and how many steps it had logged; None where it ended before.
    """
    before = len(read_lines(run / "run/events.jsonl"))
    # In a few milliseconds a phase has begun; the longest of them lasts some tenths of a second.
    passes, delay = chance.randint(0, 2), chance.uniform(0, 0.15)
    end = time.monotonic() + LIMIT_S
    while process.poll() is None:
        if time.monotonic() > end:
            kill(process)
            raise SystemExit(f"a run aimed at {aim} hangs: no such phase within {LIMIT_S} s")
        events = read_lines(run / "run/events.jsonl")[before:]
        begun = sum(event["event"] == ("load ends" if aim == "step" else f"{aim} begins") for event in events)
        if begun > (passes if aim in ("save", "evaluation") else 0):
            time.sleep(delay * (10 if aim in ("step", "load") else 1))
            break
        time.sleep(0.005)
    if process.poll() is not None:
        return None
    kill(process)
    steps = [line["step"] for line in read_lines(run / "run/log.jsonl")]
    return phase_of(read_lines(run / "run/events.jsonl")), max(steps, default=0)


def damage(run: Path, chance: random.Random) -> str:
    """Damage the newest checkpoint as a bad disk or a hasty hand does; say how."""
    found = sorted((run / "run/checkpoints").glob("global_step*"), key=lambda path: int(path.name[11:]))
    if len(found) < 2:
        return "–"
    file = chance.choice(sorted(path for path in found[-1].iterdir() if path.is_file()))
    how = chance.choice(["cut short", "one bit", "deleted"])
    if how == "deleted":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        if how == "cut short":
            content = content[: len(content) // 2]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return f"{found[-1].name}/{file.name}: {how}"


def compare(run: Path, reference: Path) -> list[str]:
    """List what differs between two finished runs; nothing where they are equal."""
    wrong = []
    if (run / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes():
        wrong.append("the final weights differ")
    for name in ("loss", "grad_norm", "row_ids", "eval_loss"):
        one, other = (
            [(line["step"], line[name]) for line in read_lines(folder / "run/log.jsonl") if name in line]
            for folder in (run, reference)
        )
        if one != other:
            wrong.append(f"{name} of {sum(a != b for a, b in zip(one, other, strict=False))} step(s) differ")
    rows = [row for line in read_lines(run / "run/log.jsonl") for row in line.get("row_ids", [])]
    count = Counter(rows[:30])
    if len(count) != 30:
        wrong.append("the first epoch did not see each row once")
    return wrong


def print_table(console: Console, kills: list[Kill]) -> None:
    """Print the kills in their order."""
    table = Table("kill", "aimed at", "the run's log says", "steps logged", "s after start", "then damaged")
    for number, one in enumerate(kills, 1):
        table.add_row(str(number), one.aimed, one.phase, str(one.step), f"{one.seconds:.1f}", one.damage)
    console.print(table)
    phases = Counter(one.phase for one in kills)
    console.print("killed in: " + ", ".join(f"{phase} {phases[phase]}" for phase in PHASES))


@click.command()
@click.option("--kills", default=20, show_default=True, help="Kills in all.")
@click.option("--each", default=3, show_default=True, help="Kills in each phase, at least.")
@click.option("--steps", default=24, show_default=True, help="Steps of a run.")
@click.option("--out", default="runs/chaos", show_default=True, type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(kills: int, each: int, steps: int, out: Path, seed: int) -> None:
    """Disturb a run and compare it with one that was left alone; exit code 1 where they differ."""
    console, chance = Console(highlight=False), random.Random(seed)
    if out.exists():
        console.print(f"{out} exists already: remove it, or choose another --out")
        sys.exit(2)
    out.mkdir(parents=True)
    begun = time.perf_counter()
    make_inputs(out)
    reference, run = out / "undisturbed", out / "disturbed"
    if start(out, reference, out / "undisturbed.log", steps).wait():
        console.print((out / "undisturbed.log").read_text()[-3000:], markup=False)
        sys.exit("the undisturbed run failed")
    done: list[Kill] = []
    rounds = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("kills", total=kills)
        while len(done) < kills:
            met = Counter(one.phase for one in done)
            wanted = [phase for phase in PHASES if met[phase] < each] or list(PHASES)
            aim = chance.choice(wanted)
            quota = aim == "save" and chance.random() < 0.5
            started = time.perf_counter()
            beside = len(done) % 2 == 1
            struck = strike(start(out, run, out / "disturbed.log", steps, quota, beside), run, aim, chance)
            if struck is None:
                # It came to its end first. Begin again, so that there is something left to kill.
                problems = [] if quota else compare(run, reference)
                if problems:
                    console.print(f"before the last kill: {'; '.join(problems)}")
                    sys.exit(1)
                rounds += 1
                shutil.rmtree(run)
                continue
            what = damage(run, chance) if chance.random() < 0.5 else "–"
            what += f"{' (quota)' if quota else ''}{' (beside steps)' if beside else ''}"
            done.append(Kill(aim, *struck, time.perf_counter() - started, what))
            bar.update(task, completed=len(done))
    code = start(out, run, out / "disturbed.log", steps, beside=True).wait()
    print_table(console, done)
    problems = [f"the last start ended with exit code {code}"] if code else compare(run, reference)
    report = {"kills": [one._asdict() for one in done], "rounds": rounds + 1, "problems": problems, "seed": seed}
    (out / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{rounds + 1} run(s) to their end, {time.perf_counter() - begun:.0f} s")
    console.print("equal: weights, losses, rows of every step" if not problems else f"NOT equal: {'; '.join(problems)}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
