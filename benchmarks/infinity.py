"""Train a Qwen2.5-VL with random weights out of a disk: parameters, AdamW's states and gradients on NVMe, one process.

    python -m benchmarks.infinity --folder runs/infinity

Two optimizer steps of stage2 on two rows of the shipped sample, on the CPU, with the product's own loader, forward,
engine and step. Weights are drawn inside zero.Init, parameter by parameter, so that no file of them is needed and the
model is never whole in memory; the frozen tower is drawn whole, encodes the images once and is dropped, as kept
features are for. Where disk or memory are too small for the depth that is asked for, the largest that fits is trained.

`--dtype fp32` is for processors without bf16 instructions, on which a bf16 product takes hundreds of times as long; it
takes more disk (4 bytes a weight) and far more memory (sums and whole gradients of 4 bytes), so that fewer layers fit.

V vocabulary, H hidden; Ψ elements of the text model, E of its embedding.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import click
import psutil
from rich.console import Console

from benchmarks.scaling import Grid
from mirage_ds.model.presets import PRESETS, preset
from mirage_ds.plan.formulas import Sizes, sizes
from mirage_ds.plan.shape import describe, read_shape

SAMPLE = Path(__file__).parents[1] / "data/sample.jsonl"
RESULTS = Path(__file__).parent / "results"
STEPS = 2
# Elements. A sub-group's states are four buffers in fp32; the embedding of the 3B (3.1 · 10⁸) is one by itself.
SUB_GROUP, BUCKET = 250_000_000, 50_000_000
# The least that DeepSpeed runs with: one more weight than the one in use, AdamW's three states and the gradient.
WEIGHT_BUFFERS, STATE_BUFFERS = 2, 4
# Bytes of a weight in the forward, and of its gradient.
WIDTHS = {"bf16": 2, "fp32": 4}
# Left free on the disk: features, tokenizer, logs. Of memory: interpreter, libraries, logits and the allocator's gaps
# (1.1 GB above what `needs` counts for bench-87m).
SPARE_DISK, SPARE_MEMORY = 1 << 30, 5 << 29


class Needs(NamedTuple):
    """Bytes that a depth takes at its peak."""

    disk: int
    memory: int


def groups_of(model: Sizes) -> list[list[int]]:
    """Elements of the parameters of both optimizer groups, in the order of setup.weight_decay_groups."""
    outside = [model.embedding, *([model.head] if model.head else [])]
    return [[outside[0], *model.matrices * model.layers, *outside[1:]], [*model.layers * [model.vectors], model.norm]]


def ds_json(folder: str, model: Sizes, dtype: str) -> dict[str, Any]:
    """Write the DeepSpeed JSON: everything on NVMe, nothing read ahead, nothing kept."""
    return {
        "bf16": {"enabled": dtype == "bf16"},
        # One micro-step a step: nothing is accumulated, so bf16 loses nothing and saves 2 Ψ bytes of memory.
        "data_types": {"grad_accum_dtype": dtype},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "contiguous_gradients": False,
            "reduce_bucket_size": BUCKET,
            "sub_group_size": SUB_GROUP,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "offload_param": {
                "device": "nvme",
                "nvme_path": folder,
                "buffer_count": WEIGHT_BUFFERS,
                "buffer_size": max(model.embedding, *model.matrices),
                "max_in_cpu": 0,
                "pin_memory": False,
            },
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": folder,
                "buffer_count": STATE_BUFFERS,
                "pin_memory": False,
            },
        },
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 32,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        },
    }


def needs(model: Sizes, dtype: str) -> Needs:
    """Count what training a model takes at its peak, on one rank.

    Disk: 12 B of states, 4 B of gradient and b B of weight an element, b = 2 in bf16 and 4 in fp32. Memory: what
    offloading itself takes (engine.offload_bytes.memory_of: buffers, and b Ψ bytes of accumulated gradients); while
    backward runs b Ψ bytes of whole gradients, since in stage2 a weight's gradient is whole only when backward has come
    to the first pass; the whole embedding and its gradient, and that gradient in fp32 on its way to the disk. The tower
    is dropped before.
    """
    from mirage_ds.engine.offload_bytes import files_of, memory_of, read_keys

    keys, width = read_keys(ds_json("/", model, dtype)), WIDTHS[dtype]
    files = files_of(keys, groups_of(model), 1)
    training = memory_of(keys, groups_of(model), 1).total + width * model.text + (2 * width + 4) * model.embedding
    return Needs(files.weights + files.optimizer + SPARE_DISK, max(training, width * model.vision) + SPARE_MEMORY)


def deepest(model: Sizes, wanted: int, have: Needs, dtype: str) -> int:
    """Return the largest depth up to `wanted` whose needs are within `have`; 0 where not even one layer fits."""
    for depth in range(wanted, 0, -1):
        one = needs(model._replace(layers=depth), dtype)
        if one.disk <= have.disk and one.memory <= have.memory:
            return depth
    return 0


@dataclass
class Phase:
    """A part of the run: seconds, bytes that the process read from and wrote to the disk, its largest memory so far."""

    name: str
    seconds: float
    read: int
    written: int
    peak_memory: int


class Clock:
    """Cuts a process's life into phases."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._last = self._now()

    def _now(self) -> tuple[float, int, int]:
        moved = psutil.Process().io_counters()
        return time.perf_counter(), moved.read_bytes, moved.write_bytes

    def cut(self, name: str) -> None:
        """End the phase under way."""
        now = self._now()
        seconds, read, written = (a - b for a, b in zip(now, self._last, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        self.phases.append(Phase(name, round(seconds, 1), int(read), int(written), peak))
        self._last = now


class Watch:
    """Looks at a process tree's memory and at a folder's size until it is stopped."""

    def __init__(self, process: int, folder: Path, every: float = 0.5):
        self.memory = self.disk = 0
        self._process, self._folder, self._every = psutil.Process(process), folder, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(self._every):
            tree = [self._process]
            with suppress(psutil.NoSuchProcess):
                tree += self._process.children(recursive=True)
            self.memory = max(self.memory, sum(_resident(one) for one in tree))
            self.disk = max(self.disk, used(self._folder))

    def stop(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def used(folder: Path) -> int:
    """Bytes that a folder's files take on the disk; files that vanish meanwhile take none."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.lstat().st_blocks * 512
    return total


# ---------------------------------------------------------------------------------------------------- in the process


def draw_model(folder: Path, values: dict[str, Any], chunk_bytes: int) -> Any:
    """Draw a MirageModel inside zero.Init: torch's own initialisation, the embedding at 1/50 of it (N(0, 0.02²))."""
    import deepspeed
    import torch
    from torch import nn
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    from mirage_ds.model.attention import INTERFACE_NAME, register
    from mirage_ds.model.forward import MirageModel
    from mirage_ds.model.load import read_config
    from mirage_ds.model.loss import LossHead

    register()
    text: Any = read_config(folder).text_config
    text._attn_implementation = INTERFACE_NAME
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=values):
        language = Qwen2_5_VLTextModel(text)
        head = None if text.tie_word_embeddings else nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    embedding = language.embed_tokens.weight
    with deepspeed.zero.GatheredParameters([embedding], modifier_rank=0), torch.no_grad():
        embedding.mul_(0.02)
    return MirageModel(
        language,
        LossHead(embedding if head is None else head.weight, text.vocab_size, chunk_bytes),
        None,
        grounded=False,
        reduction="sample",
        attention="sdpa",
        checkpointing=True,
    )


def draw_tower(folder: Path, dtype: Any) -> Any:
    """Draw the frozen tower."""
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    from mirage_ds.model.load import read_config
    from mirage_ds.model.vision import FrozenTower

    vision: Any = read_config(folder).vision_config
    vision._attn_implementation = "sdpa"
    torch.manual_seed(1)
    return FrozenTower(Qwen2_5_VisionTransformerPretrainedModel._from_config(vision, dtype=dtype))


def train(answers: Any, place: Path, settings: dict[str, Any]) -> None:
    """Train in this process; put (phases, steps) into `answers`."""
    clock = Clock()
    import torch
    from mirage_ds.run.startup import quiet

    from mirage_ds.config.run import RunConfig
    from mirage_ds.data.loader import build_index
    from mirage_ds.engine import ds_config as ds
    from mirage_ds.engine.offload import check_offload
    from mirage_ds.engine.setup import check_ds_config, join, make_engine
    from mirage_ds.engine.swap_folders import claim_folders
    from mirage_ds.plan.mfu import ModelFlops
    from mirage_ds.run import records as run_records
    from mirage_ds.run import setup as prepare
    from mirage_ds.run.step import step
    from mirage_ds.run.stop import never

    world = join()
    config = RunConfig(**settings)
    model_folder = place / "model"
    json_path = config.deepspeed or place
    values = ds.resolve(ds.read_json(json_path), json_path, config, world.size)
    check_ds_config(values, json_path)
    shape = read_shape(str(model_folder))
    model_sizes = sizes(shape)
    check_offload(values, json_path, groups_of(model_sizes), model_sizes.matrices, world, checkpoints=False)
    values, swap = claim_folders(values, world)
    clock.cut("imports, checks")
    tower = draw_tower(model_folder, getattr(torch, ds.compute_dtype(values)))
    encoder = run_records.make_encoder(config, [model_folder])
    index = build_index(config.records, encoder, config.max_length, config.max_dropped_share, config.kept_fields)
    measured = run_records.measure(config, encoder, tower, config.records, index, False, world, never, quiet)
    # Nothing calls its weights any more.
    tower.tower.to("meta")
    clock.cut("tower, features")
    model = draw_model(model_folder, values, config.loss_chunk_mb << 20)
    clock.cut("weights drawn")
    engine = make_engine(model, config, values, STEPS)
    clock.cut("engine, states to the disk")
    passes = config.latent_size + 1
    loader = run_records.make_loader(config, measured, world.rank, passes)
    prepared = prepare.Prepared(
        world=world,
        engine=engine,
        tower=tower,
        loader=loader,
        measured=measured.index,
        steps=STEPS,
        save=lambda: None,
        state={},
        checkpoint=None,
        resumed={},
        evaluation=None,
        skipped=[],
        swap=swap,
        flops=ModelFlops(shape, config.train_vision, config.train_targets),
        peak=None,
    )
    steps = []
    for plan, batches in loader.steps(0, STEPS):
        apply = engine.step

        def timed(*args: Any, apply: Any = apply, number: int = plan.step + 1, **kwargs: Any) -> None:
            clock.cut(f"step {number}, forward and backward")
            apply(*args, **kwargs)

        engine.step = timed
        taken = step(config, prepared, plan, batches)
        engine.step = apply
        clock.cut(f"step {plan.step + 1}, optimizer")
        steps.append({"tokens": taken.tokens, "rows": len(plan.rows), "applied": taken.applied, **taken.metrics})
    swap.release()
    answers.put(([asdict(phase) for phase in clock.phases], steps, torch.__version__))


# --------------------------------------------------------------------------------------------------- around the process


def make_inputs(place: Path, name: str, depth: int, swap: Path, dtype: str) -> Sizes:
    """Write the model's configuration at `depth`, a tokenizer trained on the sample, and the DeepSpeed JSON."""
    from mirage_ds.model.init import init_model

    folder = place / "model"
    init_model(name, folder, texts=[SAMPLE], config_only=True)
    values = json.loads((folder / "config.json").read_text())
    text = values["text_config"]
    text["num_hidden_layers"] = depth
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:depth]
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    model = sizes(describe(values, str(folder)))
    (place / "ds.json").write_text(json.dumps(ds_json(str(swap), model, dtype), indent=1))
    return model


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the phases and the totals."""
    rows = [
        [
            phase["name"],
            f"{phase['seconds']:.0f}",
            *(f"{phase[key] / 1e9:.1f}" for key in ("read", "written", "peak_memory")),
        ]
        for phase in result["phases"]
    ]
    title = f"{result['model']}, {result['depth']} of {result['full_depth']} layers, Ψ = {result['elements']:,}"
    console.print(Grid(title, ["phase", "s", "GB read", "GB written", "peak GB of memory"], rows).rich())
    losses = ", ".join(f"{one['loss']:.4f}" for one in result["steps"])
    console.print(
        f"loss {losses}; disk {result['peak_disk'] / 1e9:.1f} GB, "
        f"memory {result['peak_memory'] / 1e9:.1f} GB at the peak; computed {result['computed_disk'] / 1e9:.1f} and "
        f"{result['computed_memory'] / 1e9:.1f}"
    )


@click.command()
@click.option("--model", "name", default="qwen2.5-vl-3b", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--depth", type=click.IntRange(1), help="Decoder layers.  [default: all]")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(list(WIDTHS)), help="Of the forward.")
@click.option("--folder", default="runs/infinity", show_default=True, type=click.Path(path_type=Path), help="On NVMe.")
@click.option("--latent_size", default=2, show_default=True, type=click.IntRange(1))
@click.option("--rows", default=2, show_default=True, type=click.IntRange(1), help="Rows an optimizer step.")
@click.option("--threads", default=os.cpu_count(), show_default=True, type=click.IntRange(1))
@click.option(
    "--out", type=click.Path(path_type=Path), help="JSON file.  [default: benchmarks/results/infinity-<date>]"
)
def main(
    name: str,
    depth: int | None,
    dtype: str,
    folder: Path,
    latent_size: int,
    rows: int,
    threads: int,
    out: Path | None,
) -> None:
    """Train two steps of stage2 out of a disk, and say what it took."""
    console = Console(highlight=False, width=140)
    values = preset(name)
    if not values["text_config"]["vocab_size"]:
        values["text_config"]["vocab_size"] = 512
    model = sizes(describe(values, name))
    folder.mkdir(parents=True, exist_ok=True)
    from mirage_ds.engine.offload import memory_to_be_had

    have = Needs(shutil.disk_usage(folder).free, memory_to_be_had())
    wanted = depth or model.layers
    chosen = deepest(model, wanted, have, dtype)
    said = f"{have.disk / 1e9:.1f} GB of disk are free in {folder} and {have.memory / 1e9:.1f} GB of memory"
    least = needs(model._replace(layers=chosen or 1), dtype)
    if not chosen:
        console.print(f"{said}; one layer of {name} takes {least.disk / 1e9:.1f} and {least.memory / 1e9:.1f}")
        sys.exit(2)
    if chosen < wanted:
        asked = needs(model._replace(layers=wanted), dtype)
        console.print(
            f"{said}; {wanted} layers take {asked.disk / 1e9:.1f} and {asked.memory / 1e9:.1f}: "
            f"stepping down to {chosen}"
        )
    console.print(
        f"{chosen} layers: {least.disk / 1e9:.1f} GB of disk and {least.memory / 1e9:.1f} GB of memory, computed"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    os.environ |= dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    os.environ |= dict(HF_HUB_OFFLINE="1")
    context = multiprocessing.get_context("spawn")
    process, watch, found = None, None, None
    with tempfile.TemporaryDirectory(prefix="infinity-", dir=folder) as scratch:
        place = Path(scratch)
        swap = place / "swap"
        swap.mkdir()
        used_model = make_inputs(place, name, chosen, swap, dtype)
        settings = dict(
            model=str(place / "model"), stage="stage2", latent_size=latent_size, data_path=SAMPLE,
            save_model_path=place / "out", cache_dir=place / "cache", global_batch_size=rows, max_steps=STEPS,
            warmup_steps=0, lr_scheduler="constant", learning_rate=1e-5, num_workers=0, report_to=["none"],
            deepspeed=place / "ds.json",
        )  # fmt: skip
        answers = context.Queue()
        try:
            process = context.Process(target=train, args=(answers, place, settings))
            process.start()
            watch = Watch(int(process.pid or 0), swap)
            while found is None and process.is_alive():
                with suppress(Empty):
                    found = answers.get(timeout=1)
            process.join()
        finally:
            if watch:
                watch.stop()
            if process and process.is_alive():
                process.kill()
                process.join()
    if found is None:
        sys.exit(f"the training process ended with exit code {process.exitcode}")
    phases, steps, torch_version = found
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=SAMPLE.parent, capture_output=True, text=True, check=True)
    result = {
        "date": time.strftime("%Y-%m-%d"), "model": name, "depth": chosen, "full_depth": model.layers,
        "elements": used_model.text, "latent_size": latent_size, "threads": threads, "torch": torch_version,
        "memory": psutil.virtual_memory().total, "peak_memory": watch.memory, "peak_disk": watch.disk,
        "computed_memory": least.memory, "computed_disk": least.disk, "phases": phases, "steps": steps,
        "ds_config": ds_json("…", used_model, dtype),
        "dtype": dtype, "commit": commit.stdout.strip(),
    }  # fmt: skip
    out = out or RESULTS / f"infinity-{result['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result) + "\n")
    print_result(console, result)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
