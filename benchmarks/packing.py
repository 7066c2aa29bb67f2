"""Pack steps of several lengths of rows for several numbers of ranks: how full, how even, how fast.

    python -m benchmarks.packing
    python -m benchmarks.packing --tokens 2000000 --ranks 8,32,128 --steps 20 --markdown

Rows are drawn anew for each step: `vsp`, those of VSP planning maps of levels 3 to 6 with a rationale; `uniform` and
`log-uniform`, 50 to 4,000 tokens; `vsp, patches`, the first with a limit of image patches that is met before that of
the tokens. No GPU.

R rows of a step, W ranks, G micro-steps of a step.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from rich.console import Console

from benchmarks.scaling import Grid, _numbers
from mirage_ds.data.pack import fill, pack
from mirage_ds.plan.formulas import flops
from mirage_ds.plan.shape import read_shape, sizes

SHORTEST, LONGEST = 50, 4000
# Records that VSP rows are drawn from; their pictures take seconds to draw.
RECORDS = 400
# With this share of the patches that a bin's tokens bring, patches are what fills a bin.
PATCH_SHARE = 0.7
# Labelled tokens, as in benchmarks/scaling.py.
LABELLED = 0.2
COLUMNS = (
    *("rows", "R", "tokens", "W", "micro-steps", "least", "balance", "at most", "worst step", "by FLOPs", "capacity"),
    *("steps at the least", "ms a plan", "slowest"),
)


class Rows(NamedTuple):
    """What steps are drawn from.

    Attributes:
        draw: (random, R) → (R,) tokens and (R,) image patches.
        mean: tokens of a row.
        patch_capacity: patches a bin holds at most.
    """

    name: str
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray | None]]
    mean: float
    patch_capacity: int | None = None


def vsp(capacity: int) -> list[Rows]:
    """Measure VSP planning records as a run does, with and without a limit of patches."""
    from benchmarks.workload import make_workload
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.load import load_encoder
    from mirage_ds.data.record_files import scan

    with tempfile.TemporaryDirectory() as folder:
        work = make_workload(Path(folder), "nano", RECORDS, "vsp")
        encoder = load_encoder([str(work.model)], ImageFinder.beside(work.records, None), "stage1", 4)
        measures = [encoder.measure(record) for record in scan(work.records)[0]]
        merged = encoder.images.merge_size**2
    tokens = np.array([one.tokens for one in measures])
    patches = np.array([merged * (sum(one.images) + sum(one.helpers)) for one in measures])

    def draw(random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        at = random.integers(0, len(tokens), rows)
        return tokens[at], patches[at]

    mean = float(tokens.mean())
    limit = max(int(patches.max()), int(PATCH_SHARE * capacity * patches.mean() / mean))
    return [Rows("vsp", draw, mean), Rows("vsp, patches", draw, mean, limit)]


def synthetic() -> list[Rows]:
    """Rows of very different lengths, uniform and log-uniform."""
    spread = math.log(LONGEST / SHORTEST)
    return [
        Rows(
            "uniform",
            lambda random, rows: (random.integers(SHORTEST, LONGEST + 1, rows), None),
            (SHORTEST + LONGEST) / 2,
        ),
        Rows(
            "log-uniform",
            lambda random, rows: ((SHORTEST * np.exp(spread * random.random(rows))).astype(np.int64), None),
            (LONGEST - SHORTEST) / spread,
        ),
    ]


def measure(rows: Rows, count: int, ranks: int, capacity: int, steps: int) -> list[str]:
    """Plan `steps` steps of `count` rows; a line of the table."""
    random = np.random.default_rng(0)
    model = sizes(read_shape("qwen2.5-vl-7b"))
    found, seconds = [], []
    for _ in range(steps):
        lengths, patches = rows.draw(random, count)
        patch_capacity = rows.patch_capacity
        start = time.process_time()
        bins = pack(lengths, ranks, capacity, None, patches if patch_capacity else None, patch_capacity)
        seconds.append(time.process_time() - start)
        plan = [bins[at : at + ranks] for at in range(0, len(bins), ranks)]
        full = fill(plan, lengths, capacity, patches if patch_capacity else None, patch_capacity)
        mega = [round(flops(model, n, LABELLED * n, n / 2) / 1e6) for n in lengths.tolist()]
        # The largest bin of all holds the longest row; and one bin has so many rows, at best the shortest.
        together = np.sort(lengths)[: math.ceil(count / len(bins))].sum()
        bound = lengths.sum() / max(lengths.sum(), ranks * max(lengths.max(), together))
        found.append((lengths.sum(), len(plan), full.balance, bound, fill(plan, mega, capacity).balance, full.capacity))
    tokens, micro_steps, balance, bounds, by_flops, used = np.array(found).T
    return [
        rows.name,
        f"{count:,}",
        f"{tokens.mean():,.0f}",
        str(ranks),
        f"{micro_steps.mean():.2f}",
        f"{(used * micro_steps).mean():.2f}",
        f"{balance.mean():.4f}",
        f"{bounds.mean():.4f}",
        f"{balance.min():.4f}",
        f"{by_flops.mean():.4f}",
        f"{used.mean():.4f}",
        f"{(used == 1).mean():.1%}",
        f"{1000 * np.median(seconds):.1f}",
        f"{1000 * max(seconds):.1f}",
    ]


@click.command(context_settings={"show_default": True})
@click.option("--tokens", default="65536,262144", callback=_numbers, help="Tokens of a step.")
@click.option("--ranks", default="1,2,8,32", callback=_numbers, help="Numbers of ranks, W.")
@click.option("--capacity", default=8192, help="Tokens a bin holds, --micro_batch_tokens of a run.")
@click.option("--steps", default=200, help="Steps of each line.")
@click.option("--rows", default=None, type=int, help="Rows of a step, instead of --tokens.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def main(
    tokens: tuple[int, ...], ranks: tuple[int, ...], capacity: int, steps: int, rows: int | None, markdown: bool
) -> None:
    """Print balance and use of the capacity (mirage_ds.data.pack.Fill), micro-steps and CPU time of a plan."""
    lines = [
        measure(source, count, width, capacity, steps)
        for source in (*vsp(capacity), *synthetic())
        for count in ([rows] if rows else [round(one / source.mean) for one in tokens])
        for width in ranks
    ]
    grid = Grid(f"{steps} steps a line, bins of {capacity:,} tokens", list(COLUMNS), lines)
    if markdown:
        click.echo(f"**{grid.title}**\n\n{grid.markdown()}")
        return
    console = Console(highlight=False)
    console.width = max(console.width, 160)
    console.print(grid.rich())


if __name__ == "__main__":
    main()
