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
from mirage_ds.plan.formulas import gather_calls, step_calls, volume, walk
from mirage_ds.plan.settings import Zero3
from mirage_ds.plan.shape import Sizes, read_shape, sizes

SAMPLE = Path(__file__).parents[1] / "data/sample.jsonl"
K, RANKS, STEPS, MICRO_STEPS = 4, 2, 2, 2
# Elements of one of nano's decoder layers, and limits in its measure; its vectors stay whole, as in a large model.
LAYER = 196_608
RELEASED = Zero3(max_live=2 * LAYER, reuse=2 * LAYER, prefetch=LAYER, persistence=1000, bucket=LAYER // 10)
KEPT = Zero3(persistence=10**12, bucket=LAYER // 10)


class Case(NamedTuple):
    """One run: what it is called, its stage, its limits, whether the last pass has a backward of its own, its ZeRO."""

    name: str
    stage: str
    zero: Zero3
    split: bool = False
    level: int = 3


CASES = [
    Case("kept", "sft", KEPT),
    Case("released", "sft", RELEASED),
    Case("kept", "stage2", KEPT),
    Case("kept", "stage2", KEPT, split=True),
    Case("kept, hpZ", "stage2", replace(KEPT, hpz=RANKS)),
    Case("released", "stage2", RELEASED),
    Case("released", "stage2", RELEASED, split=True),
    # As 5 · 10⁷ is for the 7B's layer of 2.3 · 10⁸.
    Case("released, 0.2 layers ahead", "stage2", replace(RELEASED, prefetch=LAYER // 5)),
    Case("released, nothing ahead", "stage2", replace(RELEASED, max_live=0, reuse=0)),
    Case("released, hpZ", "stage2", replace(RELEASED, hpz=RANKS)),
    *(Case(f"ZeRO-{level}", "stage2", KEPT, split, level) for level in (0, 1, 2) for split in (False, True)),
]


COLUMNS = (
    *("stage", "parameters", "two backwards", "gathered, at most", "among all ranks, 1st micro-step", "2nd"),
    *("in the node, 1st", "2nd", "calls, about", "counted", "gathered after the step", "counted", "calls", "counted"),
    *("reduced in a micro-step", "counted", "losses as kept"),
)


def ds_json(case: Case) -> dict[str, Any]:
    """Write a case as a DeepSpeed JSON."""
    zero, values = case.zero, {"stage": case.level, "overlap_comm": False, "reduce_bucket_size": case.zero.bucket}
    if case.level == 3:
        values |= {
            "stage3_max_live_parameters": zero.max_live,
            "stage3_max_reuse_distance": zero.reuse,
            "stage3_prefetch_bucket_size": zero.prefetch,
            "stage3_param_persistence_threshold": zero.persistence,
            "zero_hpz_partition_size": zero.hpz,
        }
    return {"zero_optimization": values}


class Counted(NamedTuple):
    """What one rank saw of a run's last step.

    Attributes:
        elements, calls: (micro-step, kind) → as listen.Heard has them.
        losses: of every step.
    """

    elements: dict[tuple[int, str], int]
    calls: dict[tuple[int, str], int]
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
    json_path.write_text(json.dumps(ds_json(case)))
    config = RunConfig(
        model=str(model), stage=case.stage, data_path=SAMPLE, save_model_path=out / "run", overwrite=True,
        latent_size=K, global_batch_size=MICRO_STEPS * 2 * RANKS, micro_batch_size=2, max_steps=STEPS, num_workers=0,
        deepspeed=json_path, report_to=["none"], cache_dir=out / "cache", warmup_steps=0,
    )  # fmt: skip
    run = Run(config, world)
    data, learner = open_run(run)
    learner.engine.module.how.split = case.split
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
    return Counted(elements, calls, losses)


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
    from mirage_ds.cluster.here import free_ports
    from mirage_ds.model.init import init_model

    os.environ |= dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mirage-volumes-") as folder:
        out = Path(folder)
        init_model("nano", out / "nano", texts=[SAMPLE])
        model = sizes(read_shape(str(out / "nano")))
        answers, port = context.Queue(), free_ports()
        ranks = [context.Process(target=work, args=(r, port, out / "nano", out, answers)) for r in range(RANKS)]
        for rank in ranks:
            rank.start()
        rows: list[list[str]] = []
        losses: dict[tuple[str, bool], list[float]] = {}
        for case in CASES:
            found = answers.get(timeout=300)
            same = found.losses == losses.setdefault((case.stage, case.split), found.losses)
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
    walked = walk(case.stage, K)._replace(split=case.split)
    # What ZeRO-2 reduces is the same; the others gather nothing that is planned here, and reduce as the step ends.
    planned, zero3 = volume(model, walked, case.zero), case.level == 3
    share = {key: f"{number / model.text:.2f}" for key, number in found.elements.items()}
    last = MICRO_STEPS - 1
    return [
        *(case.stage, case.name, "yes" if case.split else "no"),
        f"{planned.gathered / model.text:.2f}" if zero3 else "0",
        *(share.get((number, kind), "0") for kind in ("all ranks", "node") for number in (0, last)),
        str(gather_calls(model, walked, case.zero) if zero3 else 0),
        str(found.calls.get((last, "all ranks"), 0) + found.calls.get((last, "node"), 0)),
        f"{planned.step / model.text:.2f}" if zero3 else "",
        share.get((last, "step"), "0"),
        str(step_calls(model, case.zero)) if zero3 else "",
        str(found.calls.get((last, "step"), 0)),
        f"{planned.reduced / model.text:.2f}" if case.level >= 2 else "",
        *(", ".join(share.get((number, "reduced"), "0") for number in range(MICRO_STEPS)), "yes" if same else "no"),
    ]


if __name__ == "__main__":
    main()
