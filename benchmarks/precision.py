"""What the precision of weights, states, gradients and products changes in training; docs/precision.md has the result.

    python -m benchmarks.precision
    python -m benchmarks.precision --steps 20 --rates 1e-3 --markdown

A nano model on two CPU ranks under ZeRO-3, each variant from the same weights over the same rows, through the trainer's
own step. Weights start as bf16 numbers, so that no variant loses anything at its start. Stage 1 is the default: it has
both losses, and a step is one pass, so that all runs together take minutes; what bf16 does to latents that are fed
back is measured by tests/unit/model/test_forward.py. Losses and shares are those of one run each; the line with
another seed says what a difference of such a run is worth.

Ψ: elements of the sharded parameters.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import queue
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.scaling import Grid

ROOT = Path(__file__).parents[1]
RANKS, SEED = 2, 42
# Two micro-steps of two rows on each rank: a sum of gradients to round.
ROWS, MICRO_ROWS, K = 8, 2, 2
# The final loss is the mean of so many last steps.
LAST = 20
# A rank that says nothing for so long hangs; the first step of a run has its start in it.
LIMIT_S = 300

BF16 = {"enabled": True}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


class Variant(NamedTuple):
    """One way to compute: what it is called and what its JSON says beside ZeRO-3."""

    name: str
    json: dict[str, Any]
    seed: int = SEED


REFERENCE = "fp32"
# torch_autocast comes last: DeepSpeed keeps it on for the rest of a process.
VARIANTS = (
    Variant(REFERENCE, {}),
    Variant("fp32, another seed", {}, seed=SEED + 1),
    Variant("bf16, fp32 master weights (shipped)", {"bf16": BF16, **FP32_SUMS}),
    Variant("the same, gradients summed in bf16", {"bf16": BF16}),
    Variant(
        "bf16 master weights and states",
        {"bf16": {**BF16, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    ),
    Variant("torch_autocast, fp32 weights", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
)


class Job(NamedTuple):
    """One run: a variant at a learning rate."""

    variant: Variant
    rate: float


@dataclass
class Found:
    """What one run came to, seen from rank 0.

    Attributes:
        losses: of every step; evaluation: mean loss of the held-out rows at the end.
        moved: share of the optimizer's weights that are no longer what they were at the start.
        moved_in_bf16: the same, of these weights rounded to bf16: what products see in all variants but fp32.
        way: ‖w − w₀‖ over all weights; apart: ‖w − w_reference‖ / ‖w_reference − w₀‖, 0 for the reference.
        state_bytes: bytes of a sharded parameter's weight, master weight, gradient sum and moments.
        gathered_bytes, reduced_bytes: of the last step, over Ψ and the micro-steps.
        seconds: a step, the first left out.
    """

    variant: str
    rate: float
    losses: list[float]
    evaluation: float
    moved: float
    moved_in_bf16: float
    way: float
    apart: float
    state_bytes: float
    gathered_bytes: float
    reduced_bytes: float
    seconds: float

    @property
    def loss(self) -> float:
        """Mean of the last steps."""
        last = self.losses[-LAST:]
        return sum(last) / len(last)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the bytes that this rank's gathers and reductions make whole, while it lasts."""
    from deepspeed.runtime.zero import partition_parameters as partition
    from deepspeed.runtime.zero import stage3

    heard: Counter[str] = Counter()
    gather, reduce = partition._dist_allgather_fn, stage3.reduce_scatter_coalesced

    def counted_gather(part: Any, whole: Any, group: Any = None) -> Any:
        heard["gathered"] += whole.numel() * whole.element_size()
        return gather(part, whole, group)

    def counted_reduce(tensors: Any, group: Any = None) -> Any:
        heard["reduced"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return reduce(tensors, group)

    with (
        mock.patch.object(partition, "_dist_allgather_fn", counted_gather),
        mock.patch.object(stage3, "reduce_scatter_coalesced", counted_reduce),
    ):
        yield heard


def states(optimizer: Any) -> list[Any]:
    """This rank's tensors of one element a parameter: weights, master weights, gradient sums, moments."""
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    return [
        *optimizer.fp16_partitioned_groups_flat,
        *optimizer.fp32_partitioned_groups_flat,
        optimizer.grad_partitions_flat_buffer,
        *moments,
    ]


def run(
    world: Any, job: Job, model: Path, out: Path, stage: str, count: int, references: dict[Any, Any], tell: Any
) -> Found:
    """Train one variant; all ranks call it.

    Args:
        references: (rate, seed) → this rank's final weights and their way, filled by the reference.
    """
    import torch
    import torch.distributed as dist

    from mirage_ds import train
    from mirage_ds.config.run import RunConfig
    from mirage_ds.engine.ds_config import default_path, read_json
    from mirage_ds.run import step as steps
    from mirage_ds.run.settings import Run
    from mirage_ds.run.validation import evaluate

    zero = read_json(default_path(stage), "cpu")
    # Vectors stay whole, as with the GPU files' 100,000 on a large model, and matrices do not.
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    json_path = out / f"rank{world.rank}.json"
    json_path.write_text(json.dumps({**zero, **job.variant.json}))
    config = RunConfig(
        model=str(model), stage=stage, data_path=out / "data/data.jsonl", save_model_path=out / "run", overwrite=True,
        latent_size=K, global_batch_size=ROWS, micro_batch_size=MICRO_ROWS, max_steps=count, num_workers=0,
        learning_rate=job.rate, lr_scheduler="linear", warmup_steps=min(10, count // 5), seed=job.variant.seed,
        eval_data_path=out / "held_out/data.jsonl", eval_every=count, deepspeed=json_path, report_to=["none"],
        cache_dir=out / "cache", gradient_checkpointing=False,
    )  # fmt: skip
    run = Run(config, world)
    data, learner = train.open_run(run)
    optimizer = learner.engine.optimizer

    def total(*parts: torch.Tensor) -> float:
        """√ of the sum of squares, over all ranks."""
        square = torch.stack([part.double().square().sum() for part in parts]).sum()
        dist.all_reduce(square)
        return float(square.sqrt())

    def copies(groups: list[torch.Tensor]) -> list[torch.Tensor]:
        return [group.detach().clone() for group in groups]

    masters = optimizer.fp32_partitioned_groups_flat
    before = copies(masters)
    losses, begun = [], 0.0
    for plan, batches in data.loader.steps(0, count):
        with counted() as moved_bytes:
            losses.append(steps.step(run, data, learner, plan, batches).metrics["loss"])
        begun = begun or time.perf_counter()
        tell()
    seconds = (time.perf_counter() - begun) / max(1, count - 1)
    assert data.evaluation is not None
    evaluation = evaluate(run, learner, data.evaluation)
    assert evaluation is not None
    elements = sum(group.numel() for group in masters)
    # Groups of weights are views of one storage.
    own = {one.data_ptr(): one.nbytes() for one in (tensor.untyped_storage() for tensor in states(optimizer))}
    after = [group.detach().float() for group in masters]
    way = total(*(a - b.float() for a, b in zip(after, before, strict=True)))
    reference = references.setdefault(job.rate, (after, way)) if job.variant.name == REFERENCE else references[job.rate]

    def share(now: list[torch.Tensor], then: list[torch.Tensor]) -> float:
        changed = torch.tensor([float(sum(int((a != b).sum()) for a, b in zip(now, then, strict=True))), elements])
        dist.all_reduce(changed)
        return float(changed[0] / changed[1])

    found = Found(
        variant=job.variant.name,
        rate=job.rate,
        losses=losses,
        evaluation=evaluation["loss"],
        moved=share(masters, before),
        moved_in_bf16=share([one.bfloat16() for one in masters], [one.bfloat16() for one in before]),
        way=way,
        apart=total(*(a - b for a, b in zip(after, reference[0], strict=True))) / reference[1],
        state_bytes=sum(own.values()) / elements,
        gathered_bytes=moved_bytes["gathered"] / (RANKS * elements) / plan.micro_steps,
        reduced_bytes=moved_bytes["reduced"] / (RANKS * elements) / plan.micro_steps,
        seconds=seconds,
    )
    learner.engine.destroy()
    return found


def work(rank: int, port: int, model: Path, out: Path, stage: str, count: int, jobs: list[Job], answers: Any) -> None:
    """Run all jobs as one of the ranks; rank 0 hands over what it found."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=RANKS, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {key: str(value) for key, value in place.items()}
    # DeepSpeed calls collectives that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning)
    from mirage_ds.engine.setup import join

    def tell(found: Found | None = None) -> None:
        if rank == 0:
            answers.put(found)

    world = join()
    references: dict[Any, Any] = {}
    for job in jobs:
        tell(run(world, job, model, out, stage, count, references, tell))


def make_inputs(out: Path, rows: int) -> None:
    """Build the maps and the model, whose weights become bf16 numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks.chaos import BINARIES, environment
    from mirage_ds.model.init import init_model

    build = (BINARIES / "mirage-ds", "data", "build", "vsp-spatial-planning", "--prompt", "short", "--cell_size", 28)
    for command in (
        (*build, "--levels", "3,4", "--count", rows, "--out", out / "data"),
        (*build, "--levels", "3,4", "--count", 100, "--split", "test", "--out", out / "held_out"),
    ):
        words = [str(word) for word in command]
        subprocess.run(words, env=environment(), check=True, stdout=subprocess.DEVNULL)
    init_model("nano", out / "nano", texts=[out / "data/data.jsonl"])
    file = out / "nano/model.safetensors"
    weights = {name: weight.to(torch.bfloat16).to(weight.dtype) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def train_all(out: Path, stage: str, count: int, jobs: list[Job], console: Console) -> list[Found]:
    """Run all jobs on two ranks, with a bar."""
    from mirage_ds.cluster.here import free_ports

    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_ports()
    arguments = (out / "nano", out, stage, count, jobs, answers)
    ranks = [context.Process(target=work, args=(rank, port, *arguments), daemon=True) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    done: list[Found] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("optimizer steps", total=count * len(jobs))
        end = time.monotonic() + LIMIT_S
        while len(done) < len(jobs):
            try:
                answer = answers.get(timeout=1)
            except queue.Empty:
                if any(rank.exitcode for rank in ranks) or time.monotonic() > end:
                    for rank in ranks:
                        rank.kill()
                    sys.exit(f"after {len(done)} runs a rank failed, or said nothing for {LIMIT_S} s")
                continue
            end = time.monotonic() + LIMIT_S
            if isinstance(answer, Found):
                done.append(answer)
            else:
                name = jobs[len(done)].variant.name
                bar.update(task, advance=1, description=f"{name}, lr {jobs[len(done)].rate:g}")
    for rank in ranks:
        rank.join()
    return done


COLUMNS = (
    *("variant", "final loss", "held-out loss", "minus fp32", "moved", "moved in bf16", "way / fp32's"),
    *("apart from fp32", "B a parameter", "B gathered", "B reduced"),
)


def grid(rate: float, found: list[Found], stage: str, count: int) -> Grid:
    """Put the runs at one learning rate into a table."""
    reference = next(one for one in found if one.variant == REFERENCE)
    rows = [
        [
            *(one.variant, f"{one.loss:.4f}", f"{one.evaluation:.4f}"),
            "–" if one is reference else f"{one.evaluation - reference.evaluation:+.4f}",
            *(f"{one.moved:.1%}", f"{one.moved_in_bf16:.1%}", f"{one.way / reference.way:.3f}", f"{one.apart:.3f}"),
            *(f"{one.state_bytes:.1f}", f"{one.gathered_bytes:.2f}", f"{one.reduced_bytes:.2f}"),
        ]
        for one in found
    ]
    return Grid(f"{stage}, {count} steps of {ROWS} rows, lr {rate:g}", list(COLUMNS), rows)


def record(found: list[Found], stage: str, count: int, seconds: float) -> dict[str, Any]:
    """Describe the runs and what they ran on."""
    import deepspeed
    import torch

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, no GPU",
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "stage": stage,
        "steps": count,
        "rows_per_step": ROWS,
        "latent_size": K,
        "seed": SEED,
        "seconds": seconds,
        "runs": [asdict(one) for one in found],
    }


@click.command()
@click.option("--steps", "count", default=300, show_default=True, help="Optimizer steps of each run.")
@click.option("--stage", default="stage1", show_default=True, type=click.Choice(["sft", "stage1", "stage2"]))
@click.option("--rates", default="1e-5,1e-3", show_default=True, help="Learning rates, comma-separated.")
@click.option("--rows", default=1200, show_default=True, help="Training maps.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON of the result. [default: benchmarks/results/]")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def main(count: int, stage: str, rates: str, rows: int, out: Path | None, markdown: bool) -> None:
    """Train each variant at each learning rate; print a table and write what was found."""
    os.environ |= dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    console = Console(width=190, highlight=False)
    jobs = [Job(variant, float(rate)) for variant in VARIANTS for rate in rates.split(",")]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mirage-precision-") as folder:
        make_inputs(Path(folder), rows)
        found = train_all(Path(folder), stage, count, jobs, console)
    result = record(found, stage, count, time.perf_counter() - begun)
    out = out or ROOT / f"benchmarks/results/precision-{result['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for rate in dict.fromkeys(job.rate for job in jobs):
        one = grid(rate, [run for run in found if run.rate == rate], stage, count)
        if markdown:
            click.echo(f"**{one.title}**\n\n{one.markdown()}\n")
        else:
            console.print(one.rich())
    console.print(f"{result['seconds']:.0f} s; {out}")


if __name__ == "__main__":
    main()
