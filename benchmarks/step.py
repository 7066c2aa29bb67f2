"""Speed of an optimizer step, alone or against the plain transformers way; docs/performance.md has the results.

    python -m benchmarks.step --preset bench-87m --stage stage2 --against naive
    python -m benchmarks.step --preset bench-87m --stage stage1 --against naive --rows 1 --features off
    python -m benchmarks.step --preset bench-40m --stage sft --part decoder
    python -m benchmarks.step --preset qwen2.5-vl-7b --zero 3 --dtype bf16_states --checkpointing --profile

Prints one JSON line. The product runs as it trains: records through the loader, the trainer's own step, DeepSpeed's
engine, AdamW and clipping. The plain way (benchmarks/naive.py) gets the same rows in the same optimizer steps, from the
same weights. Each runs in processes of its own, by turns, so that memory and processor time are its own; both read and
encode their rows in the training process, whose seconds are counted. `ratio` is samples per CPU-second over the plain
way's, the median of the steps; `losses_apart` the largest relative difference of a step's loss.

On a GPU, which is taken where there is one and DS_ACCELERATOR is not cpu, the sides run one after the other, the plain
way's rows are encoded beforehand, and memory is the allocator's peak from the second step on. `planned` is what
`mirage-ds plan` says of such rows on one GPU.

T tokens and B rows of an optimizer step, k latents a run, W ranks.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
from rich.console import Console
from rich.progress import track

from benchmarks.workload import Source, Workload, make_workload
from mirage_ds.model.presets import PRESETS

ROOT = Path(__file__).parents[1]
# Steps before the clock starts: DeepSpeed records its trace in the first, torch allocates.
WARM_UP = 1
# The two k from which --profile prices a thin pass.
THIN = (2, 8)
# (rows, inner, columns) of the products that say what the machine can do; the best counts.
PRODUCTS = {
    "cpu": ((1024, 1024, 1024), (2048, 512, 1536), (2048, 2048, 2048)),
    "cuda": ((16384, 3584, 18944), (8192, 8192, 8192)),
}


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        rows: B; micro_tokens, micro_rows: what a micro-step holds at most.
        features: all (kept, no tower in a step) or off (the tower runs in every step).
        zero: ZeRO stage of the product's engine.
        dtype: fp32; bf16, with weights and states in float32; or bf16_states, all in bf16.
        plain_rows: rows that the plain way pads and takes at a time, in sft and stage1.
        device: cpu or cuda.
    """

    preset: str
    stage: str
    source: Source
    latent_size: int
    rows: int
    micro_tokens: int
    micro_rows: int | None
    features: str
    dtype: str
    threads: int
    ranks: int
    zero: int
    checkpointing: bool
    kernels: str | None
    plain_rows: int
    seed: int
    device: str

    @property
    def torch_dtype(self) -> Any:
        """Of the products."""
        import torch

        return torch.float32 if self.dtype == "fp32" else torch.bfloat16


class Told(NamedTuple):
    """One step as one process saw it."""

    loss: float
    seconds: float
    cpu_seconds: float


def finish(device: str) -> None:
    """Wait for the GPU, so that a clock can be read."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def matmul_rate(dtype: Any, device: str = "cpu") -> float:
    """FLOP/s of the machine's matrix product, the best of PRODUCTS in this process."""
    import torch

    best = 0.0
    for m, k, n in PRODUCTS[device]:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        times = []
        for _ in range(3):
            finish(device)
            begun = time.perf_counter()
            a @ b
            finish(device)
            times.append(time.perf_counter() - begun)
        best = max(best, 2 * m * k * n / statistics.median(times))
    return best


def ds_json(case: Case) -> dict[str, Any]:
    """The engine's JSON: a ZeRO stage with everything kept."""
    zero: dict[str, Any] = {"stage": case.zero, "overlap_comm": case.device == "cuda"}
    if case.zero == 3:
        zero |= dict(stage3_max_live_parameters=10**12, stage3_param_persistence_threshold=10**12)
        zero |= dict(stage3_max_reuse_distance=0)
    states = dict(bf16_master_weights_and_grads=True, bf16_optimizer_states=True)
    precision: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": dict(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}),
        "bf16_states": dict(bf16={"enabled": True, **states}),
    }
    return {"zero_optimization": zero, **precision[case.dtype]}


def run_config(case: Case, work: Workload, out: Path, steps: int) -> Any:
    """The settings of the product's run."""
    from mirage_ds.config.run import RunConfig

    path = out / "ds.json"
    path.write_text(json.dumps(ds_json(case)))
    return RunConfig(
        model=str(work.model), stage=case.stage, data_path=work.records, save_model_path=out / "run", overwrite=True,
        latent_size=case.latent_size, global_batch_size=case.rows, micro_batch_tokens=case.micro_tokens,
        micro_batch_size=case.micro_rows, max_steps=steps, epochs=1000, num_workers=0, warmup_steps=0,
        lr_scheduler="constant", deepspeed=path, report_to=["none"], cache_dir=out / "cache",
        feature_cache=case.features, gradient_checkpointing=case.checkpointing, kernels=case.kernels,
        seed=case.seed,
    )  # fmt: skip


class Steps:
    """Runs steps on demand, in a process of its own."""

    device = "cpu"

    def one(self, number: int) -> float:
        """Take optimizer step `number`; return its loss."""
        raise NotImplementedError

    def timed(self, number: int) -> Told:
        """Take a step with a clock beside it."""
        finish(self.device)
        begun, cpu = time.perf_counter(), time.process_time()
        loss = self.one(number)
        finish(self.device)
        return Told(loss, time.perf_counter() - begun, time.process_time() - cpu)

    def traced(self, number: int) -> dict[str, Any]:
        """Take a step under the profiler."""
        from benchmarks.trace import traced

        return traced(lambda: self.one(number), self.device == "cuda")


class Product(Steps):
    """The trainer's own step."""

    def __init__(self, case: Case, work: Workload, out: Path, steps: int):
        from mirage_ds.engine.setup import join
        from mirage_ds.run.settings import Run
        from mirage_ds.train import open_run

        self.case, self.work, self.device = case, work, case.device
        self.config = run_config(case, work, out, steps)
        self.run = Run(self.config, join())
        self.data, self.learner = open_run(self.run)
        self.plans = self.data.loader.steps(0, steps)
        index = self.data.index
        self.tokens, self.labels = index.tokens.tolist(), index.labels.tolist()

    def one(self, number: int) -> float:
        """Take the trainer's next step, which is this one."""
        from mirage_ds.run.step import step

        plan, batches = next(self.plans)
        assert plan.step == number
        return step(self.run, self.data, self.learner, plan, batches).metrics["loss"]

    def thin_pass(self, number: int) -> dict[str, float]:
        """Milliseconds of one more pass of a token a row: of a whole micro-step, and until the host has told it all."""
        del number
        from benchmarks.workload import encode
        from mirage_ds.data.batch import collate, to_device
        from mirage_ds.model.loss import StepCounts
        from mirage_ds.run.step import micro_step

        assert self.learner.tower is not None
        self.learner.tower.tower.to(self.device)
        took = []
        for k in THIN:
            encoder, samples = encode(self.work, self.case.stage, k, self.case.rows)
            batch = self.learner.tower.attach(to_device(collate(samples, k + 1, encoder.dummy(1)), self.device))
            counts, times = StepCounts(len(samples), len(batch.targets), k * len(samples)), []
            for _ in range(3):
                self.learner.engine.set_gradient_accumulation_boundary(False)
                finish(self.device)
                begun = time.perf_counter()
                micro_step(self.run, self.learner, batch, counts)
                host = time.perf_counter() - begun
                finish(self.device)
                times.append((time.perf_counter() - begun, host))
            took.append([min(some) for some in zip(*times[1:], strict=True)])
        more = THIN[1] - THIN[0]
        return {name: round(1e3 * (b - a) / more, 2) for name, a, b in zip(("ms", "host_ms"), *took, strict=True)}


class Plain(Steps):
    """benchmarks/naive.py over the rows that the product's plan names."""

    def __init__(self, case: Case, work: Workload, out: Path, steps: int):
        import torch

        from benchmarks.naive import Naive
        from mirage_ds.data.images import ImageFinder
        from mirage_ds.data.load import load_encoder
        from mirage_ds.data.record_files import scan

        config = run_config(case, work, out, steps)
        stage: Any = case.stage
        finder = ImageFinder.beside(work.records, None)
        self.encoder = load_encoder([str(work.model)], finder, stage, case.latent_size)
        self.records = scan(work.records)[0]
        self.naive = Naive(
            work.model,
            case.stage,
            config.gamma,
            case.torch_dtype,
            dict(lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
                 weight_decay=config.weight_decay),
            config.max_grad_norm,
            1 if case.stage == "stage2" else case.plain_rows,
            case.device,
            torch.bfloat16 if case.dtype == "bf16_states" else torch.float32,
            case.checkpointing,
        )  # fmt: skip
        self.device = case.device
        rows = range(len(self.records)) if case.device == "cuda" else ()
        self.encoded = {row: self.encoder.encode(self.records[row], row) for row in rows}
        self.plans = list(_rows_of_steps(case, len(self.records), steps))

    def one(self, number: int) -> float:
        """Encode the step's rows and train on them."""
        rows = self.plans[number]
        return self.naive.step([self.encoded.get(row) or self.encoder.encode(self.records[row], row) for row in rows])


class Decoder(Steps):
    """Forward and backward of the decoder layers alone over packed rows: no embedding, no head, no optimizer."""

    def __init__(self, case: Case, work: Workload, out: Path, steps: int):
        import torch

        from benchmarks.workload import encode
        from mirage_ds.data.batch import collate, to_device
        from mirage_ds.data.pack import pack
        from mirage_ds.model.load import load_model

        encoder, samples = encode(work, case.stage, case.latent_size)
        stage: Any = case.stage
        self.device, device = case.device, torch.device(case.device)
        loaded = load_model(
            work.model, stage=stage, dtype=case.torch_dtype, device=device, checkpointing=case.checkpointing
        )
        self.model = loaded.model
        self.tokens = [len(sample.input_ids) for sample in samples]
        self.labels = [0] * len(samples)
        passes = case.latent_size + 1 if case.stage == "stage2" else 1
        self.batches = []
        for plan in _rows_of_steps(case, len(samples), steps):
            bins = pack([self.tokens[row] for row in plan], 1, case.micro_tokens, case.micro_rows)
            dummy = encoder.dummy((passes - 1) // case.latent_size)
            batches = [collate([samples[plan[i]] for i in one], passes, dummy) for one in bins]
            self.batches.append([to_device(batch, device) for batch in batches])
        torch.manual_seed(0)

    def one(self, number: int) -> float:
        """Run a step's micro-batches; the returned number only says that something was computed."""
        import torch

        from mirage_ds.model.latents import run_passes

        text, how, total = self.model.language_model, self.model.how, 0.0
        like = dict(dtype=text.dtype, device=self.device)
        for batch in self.batches[number]:
            x = torch.randn(len(batch.input_ids), text.config.hidden_size, **like).requires_grad_()
            walked = (text, self.model.layers, x, batch.position_ids, batch.passes)
            hidden = torch.cat(run_passes(*walked, how.attention, how.checkpointing))
            hidden.backward(torch.ones_like(hidden))
            total += float(hidden.detach().square().mean())
        self.model.zero_grad()
        return total


def _rows_of_steps(case: Case, count: int, steps: int) -> Iterator[list[int]]:
    import numpy as np

    from mirage_ds.data.pack import Planner

    planner = Planner(
        lengths=np.ones(count, dtype=np.int64), row_ids=np.arange(count), rows_per_step=case.rows, world_size=1,
        micro_batch_tokens=case.rows, micro_batch_size=None, seed=case.seed,
    )  # fmt: skip
    for step in range(steps):
        yield [int(row) for row in planner.rows_of(step)]


KINDS: dict[str, Any] = {"product": Product, "plain": Plain, "decoder": Decoder}


def serve(kind: str, rank: int, port: int, case: Case, work: Workload, out: Path, steps: int, pipe: Connection) -> None:
    """Be one process: get ready, then take a step for each number that comes."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=case.ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {key: str(value) for key, value in place.items()} if kind == "product" else {}
    import warnings

    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(case.threads)
    rate = matmul_rate(case.torch_dtype, case.device)
    running = KINDS[kind](case, work, out, steps)
    pipe.send((getattr(running, "tokens", []), getattr(running, "labels", [])))
    peak = 0
    while (asked := pipe.recv()) is not None:
        what, number = asked
        if case.device == "cuda" and number == WARM_UP:
            # What loading took is over.
            torch.cuda.reset_peak_memory_stats()
        try:
            found = getattr(running, what)(number)
        except Exception as error:  # what comes after the timed steps must not lose them
            if what == "timed":
                raise
            found = {"failed": repr(error)}
        pipe.send(found)
        if what == "timed":
            peak = torch.cuda.max_memory_allocated() if case.device == "cuda" else memory("VmHWM")
    # Once more, and the faster of both: the machine may have had other work at the start.
    pipe.send((peak, max(rate, matmul_rate(case.torch_dtype, case.device))))


def memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


class Ran(NamedTuple):
    """What the processes of one kind came to.

    Attributes:
        told: step by step: loss, wall seconds, processor seconds of all ranks.
        rate: FLOP/s of the matrix product, all ranks together.
        memory: bytes at the peak, all ranks together.
    """

    told: list[Told]
    rate: float
    memory: int


class Side:
    """The processes of one kind, told to step one after another."""

    def __init__(self, kind: str, case: Case, work: Workload, out: Path, steps: int):
        from mirage_ds.cluster.here import free_ports

        out.mkdir(parents=True)
        context, port = multiprocessing.get_context("spawn"), free_ports()
        self.kind, self.ranks, self.told = kind, [], []
        for rank in range(case.ranks if kind == "product" else 1):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(kind, rank, port, case, work, out, steps, theirs), daemon=True
            )
            process.start()
            self.ranks.append((process, mine))
        self.tokens, self.labels = self._hear()[0]

    def _hear(self) -> list[Any]:
        """Receive what each process says next."""
        heard = []
        for process, pipe in self.ranks:
            while not pipe.poll(1):
                if process.exitcode is not None:
                    sys.exit(f"{self.kind}: a process ended with code {process.exitcode}")
            try:
                heard.append(pipe.recv())
            except EOFError:
                sys.exit(f"{self.kind}: a process failed")
        return heard

    def step(self, number: int) -> None:
        """Let all ranks take a step."""
        for _, pipe in self.ranks:
            pipe.send(("timed", number))
        told = self._hear()
        self.told.append(Told(told[0].loss, max(one.seconds for one in told), sum(one.cpu_seconds for one in told)))

    def ask(self, what: str, number: int) -> dict[str, Any]:
        """Let all ranks do something once their steps are timed; return what rank 0 has found."""
        for _, pipe in self.ranks:
            pipe.send((what, number))
        return dict(self._hear()[0])

    def end(self) -> Ran:
        """Stop the processes; return what they came to, without the first steps."""
        for _, pipe in self.ranks:
            pipe.send(None)
        ended = self._hear()
        for process, _ in self.ranks:
            process.join()
        return Ran(self.told[WARM_UP:], sum(rate for _, rate in ended), sum(peak for peak, _ in ended))


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most."""
    return {
        name: round(make(values), digits) for name, make in (("median", statistics.median), ("min", min), ("max", max))
    }


def datasheet_rate(case: Case) -> float | None:
    """Peak FLOP/s of the GPU in the dtype of the products, where there is one that is known."""
    import torch

    from mirage_ds.plan.mfu import peak_flops

    name = torch.cuda.get_device_name() if case.device == "cuda" else None
    return peak_flops(None, name, "fp32" if case.dtype == "fp32" else "bf16")


def summary(ran: Ran, case: Case, tokens: list[float], flops: list[float]) -> dict[str, Any]:
    """What one side's steps come to.

    Args:
        tokens, flops: of each counted step.
    """
    seconds = [one.seconds for one in ran.told]
    peak = datasheet_rate(case)
    return {
        "seconds": [round(one, 4) for one in seconds],
        "losses": [round(one.loss, 4) for one in ran.told],
        "seconds_per_row": spread([s / case.rows for s in seconds]),
        "samples_per_s": spread([case.rows / s for s in seconds]),
        "tokens_per_s": spread([t / s for t, s in zip(tokens, seconds, strict=True)], 1),
        "cpu_seconds_per_row": spread([one.cpu_seconds / case.rows for one in ran.told]),
        "peak_memory_gb": round(ran.memory / 1e9, 3),
        "matmul_gflops": round(ran.rate / 1e9, 1),
        "share_of_matmul_rate": spread([f / s / ran.rate for f, s in zip(flops, seconds, strict=True)], 3),
        **({"mfu": spread([f / s / peak for f, s in zip(flops, seconds, strict=True)], 3)} if peak else {}),
    }


def model_flops(model: Path, lengths: list[int], labels: list[int], part: str) -> float:
    """FLOPs that a step's rows need without recomputation; the tower is left out (kept features)."""
    from mirage_ds.plan.formulas import flops
    from mirage_ds.plan.shape import read_shape, sizes

    shape, tokens = sizes(read_shape(str(model))), sum(lengths)
    keys = sum(n * (n + 1) / 2 for n in lengths) / tokens
    return flops(shape, tokens, 0 if part == "decoder" else sum(labels), keys, checkpointing=False)


def compare(product: Ran, plain: Ran) -> dict[str, Any]:
    """The ratios of the two sides."""
    pairs = list(zip(product.told, plain.told, strict=True))
    return {
        "ratio": spread([b.cpu_seconds / a.cpu_seconds for a, b in pairs], 3),
        "wall_ratio": spread([b.seconds / a.seconds for a, b in pairs], 3),
        "memory_ratio": round(product.memory / plain.memory, 3),
        "losses_apart": max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs),
    }


def planned(case: Case, work: Workload, ds_path: Path, lengths: list[int], labels: list[int]) -> dict[str, Any]:
    """What `mirage-ds plan` says of one GPU that takes such rows, without a reserve and without their features."""
    from mirage_ds.plan.fit import Question, judge
    from mirage_ds.plan.spec import PlanSpec

    tokens = round(statistics.mean(lengths))
    together = min(case.rows, case.micro_rows or case.rows, case.micro_tokens // tokens)
    latents = 0 if case.stage == "sft" else case.latent_size
    spec = PlanSpec(
        model=str(work.model), stage=case.stage, latent_size=case.latent_size, row_tokens=tokens,
        micro_batch_tokens=together * tokens, micro_steps=math.ceil(case.rows / together), images=0, reserve=0,
        labelled=(statistics.mean(labels) + latents) / tokens, gpus_per_node=1, attention="torch_varlen",
        feature_cache=case.features, gradient_checkpointing=case.checkpointing,
    )  # fmt: skip
    plan = judge(Question(spec), ds_path)
    bounds = [round(seconds, 3) for seconds in (plan.step.least, plan.step.most)]
    return {"gpu": spec.gpu, "memory_gb": round(plan.held.gpu / 1e9, 3), "seconds": bounds}


def described(case: Any, device: str = "cpu") -> dict[str, Any]:
    """What was run (a dataclass), on what."""
    import torch

    commit = ""
    # A checkout may have been carried to where its history is not.
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {gpu}",
        "torch": torch.__version__,
        **asdict(case),
    }


def run(
    case: Case, work: Workload, part: str, against: str | None, repeats: int, profile: bool, folder: Path, out: Console
) -> dict[str, Any]:
    """Run the steps of all sides by turns; on a GPU, which two may not fit into, one side after the other."""
    counted = WARM_UP + repeats
    kinds = ["decoder" if part == "decoder" else "product", *(["plain"] if against else [])]
    ran, shares, sizes = {}, {}, ([], [])
    for group in [[kind] for kind in kinds] if case.device == "cuda" else [kinds]:
        sides = [Side(kind, case, work, folder / kind, counted + profile) for kind in group]
        # What the first side says; the plain way has the same rows.
        sizes = sizes if ran else (sides[0].tokens, sides[0].labels)
        for number in track(range(counted), "steps", console=out, transient=True):
            for side in sides:
                side.step(number)
        if profile:
            shares |= {f"{side.kind}_profile": side.ask("traced", counted) for side in sides}
            if case.stage == "stage2" and sides[0].kind == "product":
                shares["thin_pass"] = sides[0].ask("thin_pass", counted)
        ran |= {side.kind: side.end() for side in sides}
    tokens, flops = [], []
    for rows in list(_rows_of_steps(case, len(sizes[0]), counted))[WARM_UP:]:
        lengths, labels = ([some[row] for row in rows] for some in sizes)
        tokens.append(float(sum(lengths)))
        flops.append(model_flops(work.model, lengths, labels, part))
    return {
        **described(case, case.device),
        "part": part,
        "repeats": repeats,
        "tokens_per_row": [min(sizes[0]), max(sizes[0])],
        "model_gflops_per_row": round(statistics.mean(flops) / case.rows / 1e9, 2),
        **{kind: summary(one, case, tokens, flops) for kind, one in ran.items()},
        **({"planned": planned(case, work, folder / "product/ds.json", *sizes)} if part == "step" else {}),
        **(compare(ran["product"], ran["plain"]) if against else {}),
        **shares,
    }


@click.command()
@click.option("--preset", default="bench-87m", show_default=True, type=click.Choice(sorted(PRESETS)), metavar="NAME",
              help="Model, as `mirage-ds init` makes it.")  # fmt: skip
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A model folder in place of --preset.")
@click.option("--records", type=click.Path(exists=True, path_type=Path), help="Records in place of --source.")
@click.option("--stage", default="stage2", show_default=True, type=click.Choice(["sft", "stage1", "stage2"]))
@click.option("--source", default="vsp", show_default=True, type=click.Choice(get_args(Source)), help="Rows.")
@click.option("--latent_size", default=4, show_default=True)
@click.option("--rows", default=16, show_default=True, help="Rows an optimizer step.")
@click.option("--micro_tokens", default=16384, show_default=True, help="Tokens a micro-step holds at most.")
@click.option("--micro_rows", type=int, help="Rows a micro-step holds at most.")
@click.option("--features", default="all", show_default=True, type=click.Choice(["all", "off"]),
              help="off: the vision tower runs in every step.")  # fmt: skip
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "bf16_states"]))
@click.option("--threads", default=2, show_default=True, help="Of each process.")
@click.option("--ranks", default=1, show_default=True, help="Of the product; the plain way has one.")
@click.option("--zero", default=0, show_default=True, type=click.IntRange(0, 3), help="ZeRO stage of the product.")
@click.option("--checkpointing", is_flag=True, help="Recompute the product's layers in backward.")
@click.option("--kernels", type=click.Choice(["liger"]), help="As for a run.")
@click.option("--plain_rows", default=1, show_default=True,
              help="Rows that the plain way pads and takes at a time; one in stage2.")  # fmt: skip
@click.option("--part", default="step", show_default=True, type=click.Choice(["step", "decoder"]))
@click.option("--against", type=click.Choice(["naive"]), help="Run the plain way by turns.")
@click.option("--profile", is_flag=True, help="Take one step more, under torch's profiler (trace.py).")
@click.option("--repeats", default=5, show_default=True, help="Steps that are counted.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also append the line to this file.")
def main(
    part: str, against: str | None, profile: bool, repeats: int, out: Path | None, model: Path | None,
    records: Path | None, **settings: Any,
) -> None:  # fmt: skip
    """Measure optimizer steps; print one JSON line."""
    os.environ |= dict(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(settings["threads"]))
    import torch

    gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    if part == "decoder" and (against or settings["ranks"] > 1):
        raise click.UsageError("--part decoder runs alone, on one rank")
    settings["preset"] = model.name if model else settings["preset"]
    case = Case(**settings, device=os.environ["DS_ACCELERATOR"])
    with tempfile.TemporaryDirectory(prefix="mirage-step-") as place:
        folder, rows = Path(place), min(512, (WARM_UP + repeats + profile) * case.rows)
        work = make_workload(folder / "work", case.preset, rows, case.source, case.seed, model, records)
        found = run(case, work, part, against, repeats, profile, folder, Console(stderr=True))
    line = json.dumps(found)
    print(line)
    if out:
        with out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
