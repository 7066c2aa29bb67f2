"""Count what DeepSpeed gathers and reduces on two ranks, and compare it with mirage_ds/plan/formulas.py.

    python -m benchmarks.volumes

A nano model on the CPU, the shipped sample, two micro-steps a step. The second optimizer step is counted: the first
records the order of the weights. Counts of elements do not depend on the device; seconds would, so none are given.
hpZ's group has both ranks here, as if they were one node; its gathers are told apart by their process group.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console

from benchmarks.listen import listening
from benchmarks.scaling import Grid
from mirage_ds.plan.formulas import gather_calls, volume, walk
from mirage_ds.plan.settings import Zero3
from mirage_ds.plan.shape import Sizes, read_shape, sizes

SAMPLE = Path(__file__).parents[1] / "data/sample.jsonl"
K, RANKS, STEPS, MICRO_STEPS = 4, 2, 2, 2
# Elements of one of nano's decoder layers, and limits in its measure; its vectors stay whole, as in a large model.
LAYER = 196_608
TWO_LAYERS = Zero3(max_live=2 * LAYER, reuse=2 * LAYER, prefetch=LAYER // 4, persistence=1000, bucket=LAYER // 10)
KEPT = Zero3(persistence=1000, bucket=LAYER // 10)


class Case(NamedTuple):
    """One run: what it is called, its stage, its limits."""

    name: str
    stage: str
    zero: Zero3


CASES = [
    Case("kept", "sft", KEPT),
    Case("released, two layers", "sft", TWO_LAYERS),
    # As 10⁹ is for the 72B's layer of 0.88 · 10⁹.
    Case("released, 1.14 layers", "sft", replace(TWO_LAYERS, max_live=224_000, reuse=224_000)),
    Case("released, 0", "sft", replace(TWO_LAYERS, max_live=0, reuse=0)),
    Case("kept", "stage2", KEPT),
    Case("max_live above Ψ, reuse 0", "stage2", replace(KEPT, reuse=0, prefetch=LAYER // 4)),
    Case("max_live 0, reuse 3 Ψ", "stage2", replace(KEPT, max_live=0, reuse=13 * LAYER)),
    Case("released, two layers", "stage2", TWO_LAYERS),
    Case("released, 0", "stage2", replace(TWO_LAYERS, max_live=0, reuse=0)),
    Case("kept, hpZ", "stage2", replace(KEPT, hpz=RANKS)),
    Case("released, two layers, hpZ", "stage2", replace(TWO_LAYERS, hpz=RANKS)),
]


COLUMNS = (
    *("stage", "parameters", "computed, at most"),
    *("among all ranks, 1st micro-step", "2nd", "in the node, 1st", "2nd"),
    *("reduced", "passes in backward before", "calls, about", "counted", "losses as kept"),
)


def ds_json(zero: Zero3) -> dict[str, Any]:
    """Write the limits as a DeepSpeed JSON."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_max_live_parameters": zero.max_live,
            "stage3_max_reuse_distance": zero.reuse,
            "stage3_prefetch_bucket_size": zero.prefetch,
            "stage3_param_persistence_threshold": zero.persistence,
            "reduce_bucket_size": zero.bucket,
            "zero_hpz_partition_size": zero.hpz,
        }
    }


class Counted(NamedTuple):
    """What one rank saw of a run's last step.

    Attributes:
        elements, calls: (micro-step, "all ranks" | "node" | "reduced") → gathered or reduced.
        held: passes whose backward had begun when the micro-step's first gradient was reduced.
        losses: of every step.
    """

    elements: dict[tuple[int, str], int]
    calls: dict[tuple[int, str], int]
    held: int
    losses: list[float]


def run(world: Any, case: Case, model: Path, out: Path) -> Counted:
    """Take the steps and count the last one's collectives."""
    from deepspeed.utils import groups

    from mirage_ds.config.run import RunConfig
    from mirage_ds.run import step as steps
    from mirage_ds.run.settings import Run
    from mirage_ds.train import open_run

    # One group a process is all that DeepSpeed expects.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    json_path = out / f"{world.rank}.json"
    json_path.write_text(json.dumps(ds_json(case.zero)))
    config = RunConfig(
        model=str(model), stage=case.stage, data_path=SAMPLE, save_model_path=out / "run", overwrite=True,
        latent_size=K, global_batch_size=MICRO_STEPS * 2 * RANKS, micro_batch_size=2, max_steps=STEPS, num_workers=0,
        deepspeed=json_path, report_to=["none"], cache_dir=out / "cache", warmup_steps=0,
    )  # fmt: skip
    run = Run(config, world)
    data, learner = open_run(run)
    with listening(learner.engine) as heard:
        losses = [
            steps.step(run, data, learner, plan, batches).metrics["loss"]
            for plan, batches in data.loader.steps(0, STEPS)
        ]
    learner.engine.destroy()
    before = heard.now + 1 - MICRO_STEPS
    elements, calls = (
        {(number - before, kind): found for (number, kind), found in counted.items() if number >= before}
        for counted in (heard.elements, heard.calls)
    )
    return Counted(elements, calls, heard.began[heard.now], losses)


def work(rank: int, port: int, model: Path, out: Path, answers: Any) -> None:
    """Run all cases as one of the ranks; rank 0 hands over what it counted."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=RANKS, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {key: str(value) for key, value in place.items()}
    from mirage_ds.engine.setup import join

    world = join()
    for case in CASES:
        found = run(world, case, model, out)
        if rank == 0:
            answers.put(found)


@click.command()
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def main(markdown: bool) -> None:
    """Print elements over Ψ of both micro-steps of one optimizer step, counted and computed."""
    from benchmarks.chaos import free_port
    from mirage_ds.model.init import init_model

    os.environ |= dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mirage-volumes-") as folder:
        out = Path(folder)
        init_model("nano", out / "nano", texts=[SAMPLE])
        model = sizes(read_shape(str(out / "nano")))
        answers, port = context.Queue(), free_port()
        ranks = [context.Process(target=work, args=(r, port, out / "nano", out, answers)) for r in range(RANKS)]
        for rank in ranks:
            rank.start()
        rows: list[list[str]] = []
        losses: dict[str, list[float]] = {}
        for case in CASES:
            found = answers.get(timeout=300)
            same = found.losses == losses.setdefault(case.stage, found.losses)
            rows.append(row_of(case, found, model, same))
        for rank in ranks:
            rank.join()
    layers = model.layers * model.layer / model.text
    grid = Grid(f"Elements over Ψ = {model.text:,} (layers {layers:.2f} Ψ), one optimizer step", list(COLUMNS), rows)
    if markdown:
        click.echo(f"**{grid.title}**\n\n{grid.markdown()}")
    else:
        Console(width=160).print(grid.rich())


def row_of(case: Case, found: Counted, model: Sizes, same: bool) -> list[str]:
    """Put the numbers of one run into a row; `same`: its losses are those of kept parameters."""
    walked = walk(case.stage, K)
    share = {key: f"{number / model.text:.2f}" for key, number in found.elements.items()}
    return [
        *(case.stage, case.name, f"{volume(model, walked, case.zero).gathered / model.text:.2f}"),
        *(share.get((number, kind), "0") for kind in ("all ranks", "node") for number in (0, 1)),
        *(share[1, "reduced"], f"{found.held} of {walked.passes}"),
        str(gather_calls(model, walked, case.zero)),
        str(found.calls.get((1, "all ranks"), 0) + found.calls.get((1, "node"), 0)),
        "yes" if same else "no",
    ]


if __name__ == "__main__":
    main()
