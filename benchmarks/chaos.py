"""Kill training at random moments, damage what it left, start it again; the end must equal an undisturbed run.

    python -m benchmarks.chaos --kills 20 --out runs/chaos
    python -m benchmarks.chaos --stage rl --kills 20 --out runs/chaos_rl

Two ranks under ZeRO-3 on the CPU train a nano model on a few maps. One run is left alone. The other is killed (SIGKILL
to launcher, ranks and workers together) during a step, a save, the first load or an evaluation; the run's own
events.jsonl says in which; in rl also while answers are sampled, or scored. Every other start, and the last, writes its
checkpoints beside the steps (--async_save). Between two starts the newest checkpoint is sometimes damaged, and
sometimes the run may write no file above a size, as when a quota is used up. At the end weights, losses and the rows of
every step are compared, in rl also each answer with its rewards. No process and no temporary file may outlive a kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mirage_ds.cluster.here import free_ports

BINARIES = Path(sys.executable).parent
# Of each stage.
PHASES = {"stage2": ("load", "step", "save", "evaluation"), "rl": ("rollout", "scoring", "step", "save")}
# What ends where the steps begin.
STEPS_BEGIN = {"stage2": "load ends", "rl": "rollout ends"}
# In rl both are also steps of a rollout.
SAVE_EVERY, EVAL_EVERY = 2, 3
ROWS, PROMPTS, ANSWERS, LATENTS = 30, 4, 3, 2
# Checkpoint shards of nano are larger than this, everything else that a run writes is smaller.
QUOTA_BYTES = 400_000
LIMIT_S = 240
# Data workers look for their parent every few seconds.
LEFT_S = 15


class Kill(NamedTuple):
    """One kill: what was aimed at, what the run was doing, how far it was, what was done to its files afterwards."""

    aimed: str
    phase: str
    step: int
    seconds: float
    damage: str


class Job(NamedTuple):
    """What is trained, by how many ranks, for how many steps, below which folder; where temporary files go."""

    out: Path
    stage: str
    ranks: int
    steps: int
    scratch: Path


def varied(answers: Sequence[str], records: Sequence[Any], blocks: Sequence[Sequence[int]]) -> list[float]:
    """Reward random answers differently, slowly enough to be killed meanwhile."""
    time.sleep(0.2)
    return [len(set(answer)) % 4 + len(own) / 2 for answer, own in zip(answers, blocks, strict=True)]


def environment() -> dict[str, str]:
    """One thread a rank; nothing of a launcher's that runs this."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    kept["PATH"] = f"{BINARIES}{os.pathsep}{kept['PATH']}"
    return {**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def make_inputs(job: Job) -> None:
    """Build the maps and the model; in rl it says that stage2 has made it, so that its answers may have latents."""
    out = job.out
    build = (BINARIES / "mirage-ds", "data", "build", "vsp-spatial-planning", "--prompt", "short", "--cell_size", 28)
    model = (BINARIES / "mirage-ds", "init", "--preset", "nano", "--out", out / "nano")
    for command in (
        (*build, "--levels", "3,4", "--count", ROWS, "--out", out / "data"),
        (*build, "--levels", "3,4", "--count", 8, "--split", "test", "--out", out / "held_out"),
        (*model, "--text", out / "data/data.jsonl"),
    ):
        words = [str(word) for word in command]
        subprocess.run(words, env=environment(), check=True, stdout=subprocess.DEVNULL)
    if job.stage == "rl":
        config = out / "nano/config.json"
        trained = {"mirage": {"stage": "stage2", "latent_size": LATENTS}}
        config.write_text(json.dumps(json.loads(config.read_text()) | trained))


def start(job: Job, run: Path, log: Path, quota: bool = False, beside: bool = False) -> subprocess.Popen[bytes]:
    """Start the training command of a run; it continues where it can. `beside`: with --async_save."""
    out, ranks = job.out, job.ranks
    launch = (BINARIES / "deepspeed", "--num_accelerators", ranks, "--master_port", free_ports(), "--module")
    command = [
        *(launch if ranks > 1 else (sys.executable, "-m")),
        *("mirage_ds.train", "--stage", job.stage, "--data_path", out / "data/data.jsonl", "--latent_size", LATENTS),
        *(
            "--model",
            out / "nano",
            "--save_model_path",
            run,
            "--resume",
            "auto",
            "--max_steps",
            job.steps,
            "--num_workers",
            1,
        ),
        *("--micro_batch_size", 2, "--learning_rate", 1e-3, "--save_every", SAVE_EVERY, "--keep_checkpoints", 3),
        *("--feature_dir", out / "features", "--log_rows", "--report_to", "none", "--no_gradient_checkpointing"),
        *(["--async_save"] if beside else []),
    ]
    if job.stage == "rl":
        command += ["--prompts_per_rollout", PROMPTS, "--num_generations", ANSWERS]
        command += ["--updates", SAVE_EVERY, "--max_completion_length", 24, "--temperature", 1.5, "--beta", 0.05]
        command += ["--reward", "benchmarks.chaos:varied", "--warmup_steps", 0]
    else:
        command += [
            "--global_batch_size",
            5,
            "--eval_data_path",
            out / "held_out/data.jsonl",
            "--eval_every",
            EVAL_EVERY,
        ]

    # prlimit belongs to util-linux, which every Linux has.
    words = ["prlimit", f"--fsize={QUOTA_BYTES}", *command] if quota else command
    with log.open("ab") as file:
        return subprocess.Popen(
            [str(word) for word in words],
            env=environment() | {"TMPDIR": str(job.scratch)},
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


def kill(process: subprocess.Popen[bytes], job: Job) -> None:
    """End launcher, ranks and data workers at once; what scores answers has sessions of its own, and must end too."""
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(below, timeout=LEFT_S)
    for one in left:
        one.kill()
    # torch's own compiled code is a cache; data workers' sockets nobody can remove who is killed.
    files = [file.name for file in job.scratch.iterdir() if not file.name.startswith(("torchinductor_", "pymp-"))]
    if left or files:
        raise SystemExit(f"left by a killed run: processes {[one.pid for one in left]}, files {files}")


def strike(
    job: Job, process: subprocess.Popen[bytes], run: Path, aim: str, chance: random.Random
) -> tuple[str, int] | None:
    """Wait until the run does what is aimed at, and kill it there.

    Returns:
        What it was doing and how many steps it had logged; None where it ended before.
    """
    before = len(read_lines(run / "run/events.jsonl"))
    # In a few milliseconds a phase has begun; the longest of them lasts some tenths of a second.
    passes, delay = chance.randint(0, 2), chance.uniform(0, 0.15)
    # Phases that come once in a start, in the first steps at least, and last longer.
    long = aim in (("load", "step") if job.stage == "stage2" else ("rollout",))
    passes = 0 if long else passes
    end = time.monotonic() + LIMIT_S
    while process.poll() is None:
        if time.monotonic() > end:
            kill(process, job)
            raise SystemExit(f"a run aimed at {aim} hangs: no such phase within {LIMIT_S} s")
        events = read_lines(run / "run/events.jsonl")[before:]
        begins = STEPS_BEGIN[job.stage] if aim == "step" else f"{aim} begins"
        if sum(event["event"] == begins for event in events) > passes:
            time.sleep(delay * (10 if long else 1))
            break
        time.sleep(0.005)
    if process.poll() is not None:
        return None
    kill(process, job)
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


def compare(job: Job, run: Path, reference: Path) -> list[str]:
    """List what differs between two finished runs; nothing where they are equal."""
    wrong = []
    if (run / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes():
        wrong.append("the final weights differ")
    for name in ("loss", "grad_norm", "row_ids", "eval_loss", "reward", "kl"):
        one, other = (
            [(line["step"], line[name]) for line in read_lines(folder / "run/log.jsonl") if name in line]
            for folder in (run, reference)
        )
        if one != other:
            wrong.append(f"{name} of {sum(a != b for a, b in zip(one, other, strict=False))} step(s) differ")
    if job.stage == "rl":
        answers = read_lines(run / "run/completions.jsonl")
        if answers != read_lines(reference / "run/completions.jsonl"):
            wrong.append("the answers, or their rewards, differ")
        asked = Counter(one["line"] for one in answers)
        if len(asked) != job.steps // SAVE_EVERY * PROMPTS or {*asked.values()} != {ANSWERS}:
            wrong.append("not every prompt was asked once, or an answer is missing or there twice")
        return wrong
    rows = [row for line in read_lines(run / "run/log.jsonl") for row in line.get("row_ids", [])]
    if len(set(rows[:ROWS])) != ROWS:
        wrong.append("the first epoch did not see each row once")
    return wrong


def print_table(console: Console, kills: list[Kill], stage: str) -> None:
    """Print the kills in their order."""
    table = Table("kill", "aimed at", "the run's log says", "steps logged", "s after start", "then damaged")
    for number, one in enumerate(kills, 1):
        table.add_row(str(number), one.aimed, one.phase, str(one.step), f"{one.seconds:.1f}", one.damage)
    console.print(table)
    phases = Counter(one.phase for one in kills)
    console.print("killed in: " + ", ".join(f"{phase} {phases[phase]}" for phase in PHASES[stage]))


@click.command()
@click.option("--stage", default="stage2", show_default=True, type=click.Choice([*PHASES]))
@click.option("--ranks", default=2, show_default=True, help="Ranks of a run; one has no launcher.")
@click.option("--kills", default=20, show_default=True, help="Kills in all.")
@click.option("--each", default=3, show_default=True, help="Kills in each phase, at least.")
@click.option("--steps", default=24, show_default=True, help="Steps of a run.")
@click.option("--out", default="runs/chaos", show_default=True, type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(stage: str, ranks: int, kills: int, each: int, steps: int, out: Path, seed: int) -> None:
    """Disturb a run and compare it with one that was left alone; exit code 1 where they differ."""
    console, chance = Console(highlight=False), random.Random(seed)
    if out.exists():
        console.print(f"{out} exists already: remove it, or choose another --out")
        sys.exit(2)
    out.mkdir(parents=True)
    # Not below `out`: sockets have short names.
    scratch = tempfile.TemporaryDirectory(prefix="chaos-")
    begun, phases, job = time.perf_counter(), PHASES[stage], Job(out, stage, ranks, steps, Path(scratch.name))
    make_inputs(job)
    reference, run = out / "undisturbed", out / "disturbed"
    if start(job, reference, out / "undisturbed.log").wait():
        console.print((out / "undisturbed.log").read_text()[-3000:], markup=False)
        sys.exit("the undisturbed run failed")
    done: list[Kill] = []
    rounds = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("kills", total=kills)
        while len(done) < kills:
            met = Counter(one.phase for one in done)
            wanted = [phase for phase in phases if met[phase] < each] or list(phases)
            aim = chance.choice(wanted)
            quota = aim == "save" and chance.random() < 0.5
            started = time.perf_counter()
            beside = len(done) % 2 == 1
            process = start(job, run, out / "disturbed.log", quota, beside)
            struck = strike(job, process, run, aim, chance)
            if struck is None:
                # It came to its end first. Begin again, so that there is something left to kill.
                problems = [] if quota else compare(job, run, reference)
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
    code = start(job, run, out / "disturbed.log", beside=True).wait()
    print_table(console, done, stage)
    problems = [f"the last start ended with exit code {code}"] if code else compare(job, run, reference)
    report = {"kills": [one._asdict() for one in done], "rounds": rounds + 1, "problems": problems, "seed": seed}
    (out / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{rounds + 1} run(s) to their end, {time.perf_counter() - begun:.0f} s")
    console.print("equal: weights, losses, rows of every step" if not problems else f"NOT equal: {'; '.join(problems)}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
