"""Work the formulas of mirage_ds/plan/formulas.py out for real clusters; docs/scaling.md holds what this prints.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --model qwen2.5-vl-72b --stage stage1 --markdown

Computed from public numbers: nothing is run, no GPU, no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from mirage_ds.model.presets import PRESETS
from mirage_ds.plan.activations import splits
from mirage_ds.plan.formulas import (
    BF16,
    Machine,
    Network,
    Walk,
    flops,
    gather_calls,
    network,
    ring_latency,
    step_calls,
    thin_bytes,
    traffic,
    volume,
    walk,
)
from mirage_ds.plan.gpus import A100, H100_SXM
from mirage_ds.plan.settings import Zero3
from mirage_ds.plan.shape import Sizes, read_shape, sizes

# fp32 master weight and AdamW's two moments; they are also all that a sharded checkpoint holds.
STATE_BYTES = 12
# The sharded bf16 weight, and its gradient accumulated in fp32 (data_types.grad_accum_dtype).
SHARD_BYTES = 2 + 4

# GPU/network of a node in Gb/s: nominal speeds; docs/scaling.md names the source of each.
H100 = Machine("H100/3200", 8, H100_SXM.bf16, 80e9, 3.35e12, 450e9, 400e9)
MACHINES = (
    H100,
    Machine("A100/400", 8, A100.bf16, 40e9, 1.555e12, 300e9, 50e9),
    H100._replace(name="H100/100", nics=12.5e9),
)
KEPT = Zero3(persistence=10**12)
GIGABYTE = 1e9
# Bytes/s of a file system that all nodes share.
STORAGE = (1e9, 10e9, 100e9)


def compute_seconds(
    model: Sizes, walked: Walk, machine: Machine, tokens: float, labelled: float = 0, keys: float = 0, used: float = 1.0
) -> float:
    """Seconds of one micro-step's arithmetic on one GPU with checkpointed layers.

    Args:
        used: share of the peak FLOP/s that is reached.
    """
    work = flops(model, tokens, labelled, keys) / (machine.flops * used)
    return work + thin_bytes(model, walked) / machine.hbm


def break_even_tokens(
    seconds: float, model: Sizes, walked: Walk, machine: Machine, labelled: float, keys: float, used: float = 1.0
) -> float:
    """Tokens of one rank's micro-step whose arithmetic takes as long as its collectives.

    Args:
        seconds: of the collectives.
        labelled: share of the tokens that go through the output matrix.
    """
    fixed = compute_seconds(model, walked, machine, 0, 0, keys, used)
    one = compute_seconds(model, walked, machine, 1, labelled, keys, used) - fixed
    return max(0.0, seconds - fixed) / one


class Memory(NamedTuple):
    """Bytes of one GPU, without activations, logits, what passes leave to each other and the allocator's own losses.

    Attributes:
        shard: its part of bf16 weights, fp32 gradients, fp32 master weights and moments.
        secondary: hpZ's second copy of the weights, shared by a node.
        gathered: whole weights at one time.
        gradients: whole bf16 gradients at one time: the reduce bucket.
    """

    shard: float
    secondary: float
    gathered: float
    gradients: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def memory(model: Sizes, zero: Zero3, ranks: int) -> Memory:
    """Model states and whole tensors of one GPU under ZeRO-3 with bf16 weights and fp32 accumulation."""
    return Memory(
        shard=model.text * (SHARD_BYTES + STATE_BYTES) / ranks,
        secondary=model.text * BF16 / min(zero.hpz, ranks) if zero.hpz > 1 else 0.0,
        gathered=zero.live(model) * BF16,
        gradients=min(zero.bucket, model.text) * BF16,
    )


def checkpoint_bytes(model: Sizes) -> int:
    """Bytes of a sharded checkpoint, whatever the number of ranks."""
    return STATE_BYTES * model.text


class Question(NamedTuple):
    """What the tables are made for.

    Attributes:
        tokens: of a rank's micro-step; row_tokens: of a row, labelled: the share of them with a label.
        micro_steps: of an optimizer step.
        used: share of the peak FLOP/s reached; achieved: of the nominal link speeds.
    """

    model: Sizes
    stage: str
    k: int
    nodes: tuple[int, ...]
    tokens: int
    row_tokens: int
    labelled: float
    micro_steps: int
    used: float
    achieved: float

    @property
    def walked(self) -> Walk:
        """Walks of the stage."""
        return self.walk(self.stage, self.k)

    def walk(self, stage: str, k: int) -> Walk:
        """Walks of a stage with k latents."""
        return walk(stage, k)._replace(split=stage == "stage2" and splits(self.model, self.tokens))

    @property
    def ways(self) -> dict[str, Zero3]:
        """Three ways to hold the weights; hpZ is that of released parameters."""
        # As the shipped JSONs are filled.
        room = 2 * self.model.layer
        released = Zero3(max_live=room, reuse=room, prefetch=10**9)
        return {"kept": KEPT, "released": released, "hpZ": replace(released, hpz=H100.gpus)}

    def network(self, way: Zero3, machine: Machine, nodes: int) -> Network:
        """Collectives of an optimizer step."""
        moved = traffic(self.model, self.walked, way, nodes * machine.gpus, self.micro_steps)
        return network(moved, machine, nodes, self.achieved)

    def compute(self, machine: Machine) -> float:
        """Arithmetic of an optimizer step."""
        labelled, keys = self.labelled * self.tokens, self.row_tokens / 2
        one = compute_seconds(self.model, self.walked, machine, self.tokens, labelled, keys, self.used)
        return self.micro_steps * one


class Grid(NamedTuple):
    """A table, before it is known how it is printed."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Write it for a page."""
        lines = [self.columns, ["---:"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self) -> Table:
        """Draw it for a terminal."""
        table = Table(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


def volumes(asked: Question) -> Grid:
    """Elements of one micro-step and of the step's end."""
    rows = []
    for stage, k in (("sft, stage1", 1), ("stage2", 4), ("stage2", 8)):
        walked = asked.walk(stage, k)
        for name, way in list(asked.ways.items())[:2]:
            moved = volume(asked.model, walked, way)
            psi = [f"{number / asked.model.text:.2f}" for number in moved]
            calls = str(gather_calls(asked.model, walked, way)), str(step_calls(asked.model, way))
            title = f"{stage}, k = {k}" if stage == "stage2" else stage
            rows.append([title, name, *psi, f"{2 * sum(moved) / GIGABYTE:.0f}", *calls])
    columns = ["stage", "parameters", "gathered, forward", "backward", "reduced", "gathered, step's end", "GB in bf16"]
    title = f"Elements over Ψ = {asked.model.text:,} of a step of one micro-step, at most"
    return Grid(title, [*columns, "gathers, about", "step's end"], rows)


def seconds(asked: Question) -> Grid:
    """Seconds of the collectives, and of the arithmetic."""
    columns = ["nodes", "GPUs", *(f"{machine.name} {name}" for machine in MACHINES for name in asked.ways)]
    rows = [["arithmetic", "", *(f"{asked.compute(machine):.2f}" for machine in MACHINES for _ in asked.ways)]]
    for nodes in asked.nodes:
        row = [str(nodes), str(nodes * H100.gpus)]
        for machine in MACHINES:
            for way in asked.ways.values():
                took = asked.network(way, machine, nodes).total
                row.append(f"{took:.2f}{' ▲' if took > asked.compute(machine) else ''}")
        rows.append(row)
    steps = "one micro-step" if asked.micro_steps == 1 else f"{asked.micro_steps} micro-steps"
    title = f"Seconds that the collectives of {steps} of {asked.tokens} tokens a GPU take; ▲ longer than the arithmetic"
    return Grid(title, columns, rows)


def latency(asked: Question) -> Grid:
    """The part of the seconds that does not depend on bytes or links."""
    rows = []
    for nodes in asked.nodes:
        took = [asked.network(way, H100, nodes).latency for way in asked.ways.values()]
        one = ring_latency(nodes, H100.gpus) * 1000
        rows.append([str(nodes), str(nodes * H100.gpus), f"{one:.2f}", *(f"{seconds:.2f}" for seconds in took)])
    columns = ["nodes", "GPUs", "one call, ms", *(f"{name}, s" for name in asked.ways)]
    return Grid("The latency in them", columns, rows)


def batch(asked: Question) -> Grid:
    """Tokens and rows that are needed before arithmetic takes as long as the network."""
    name = "kept" if fits(asked) else "released"
    rows = []
    for nodes in asked.nodes:
        row, ranks = [str(nodes), str(nodes * H100.gpus)], nodes * H100.gpus
        for machine in MACHINES:
            took = asked.network(asked.ways[name], machine, nodes).total / asked.micro_steps
            keys = asked.row_tokens / 2
            tokens = break_even_tokens(took, asked.model, asked.walked, machine, asked.labelled, keys, asked.used)
            row += [f"{tokens:,.0f}", f"{max(ranks, tokens / asked.row_tokens * ranks):,.0f}"]
        rows.append(row)
    columns = ["nodes", "GPUs", *(f"{machine.name} {what}" for machine in MACHINES for what in ("tokens", "rows"))]
    title = (
        f"Tokens of a GPU's micro-step, and rows of {asked.row_tokens} tokens in that of all GPUs, from which on the "
        f"arithmetic takes longer than the collectives; parameters {name}"
    )
    return Grid(title, columns, rows)


def fits(asked: Question) -> bool:
    """Whether kept parameters fit into the larger GPU at all."""
    return memory(asked.model, KEPT, 1 << 20).total < H100.memory


def room(asked: Question) -> Grid:
    """Gigabytes of a GPU."""
    rows = []
    for nodes in asked.nodes:
        held = [memory(asked.model, way, nodes * H100.gpus).total for way in asked.ways.values()]
        rows.append([str(nodes), str(nodes * H100.gpus), *(f"{size / GIGABYTE:.0f}" for size in held)])
    return Grid("Gigabytes of a GPU before activations", ["nodes", "GPUs", *asked.ways], rows)


def checkpoints(names: list[str]) -> Grid:
    """Bytes and seconds of a sharded checkpoint."""
    rows = []
    for name in names:
        size = checkpoint_bytes(sizes(read_shape(name)))
        rows.append([name, f"{size / GIGABYTE:.0f}", *(f"{size / speed:.1f}" for speed in STORAGE)])
    return Grid("A checkpoint", ["model", "GB", *(f"s at {speed / GIGABYTE:.0f} GB/s" for speed in STORAGE)], rows)


def grids(asked: Question) -> list[Grid]:
    """All tables of one question."""
    large = [name for name in PRESETS if name.startswith("qwen")]
    return [volumes(asked), room(asked), seconds(asked), latency(asked), batch(asked), checkpoints(large)]


def draw(asked: Question, title: str, file: Path) -> None:
    """Draw collectives and arithmetic over the number of nodes, fast network beside slow."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = (MACHINES[0], MACHINES[-1])
    # Okabe and Ito's colours; markers and line styles say the same.
    styles = {"kept": ("#0072B2", "o", "-"), "released": ("#D55E00", "s", "-"), "hpZ": ("#009E73", "^", "--")}
    names = {name: f"collectives, {name}" for name in asked.ways} | {"hpZ": "collectives, released with hpZ"}
    figure, axes = plt.subplots(1, len(shown), figsize=(9, 4.2), sharey=True, layout="constrained")
    for axis, machine in zip(axes, shown, strict=True):
        for name, way in asked.ways.items():
            colour, marker, line = styles[name]
            took = [asked.network(way, machine, nodes).total for nodes in asked.nodes]
            axis.plot(asked.nodes, took, color=colour, marker=marker, linestyle=line, label=names[name])
        axis.axhline(asked.compute(machine), color="black", linestyle=":", label="arithmetic")
        axis.set(xscale="log", yscale="log", xlabel="nodes of 8 GPUs", title=f"{machine.name} Gb/s a node")
        axis.set_xticks(asked.nodes, [str(nodes) for nodes in asked.nodes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds of a micro-step (computed)")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _numbers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"'{value}' is no list of numbers; write for example 1,2,4") from None


@click.command(context_settings={"show_default": True})
@click.option("--model", default="qwen2.5-vl-7b", type=click.Choice([name for name in PRESETS if name != "nano"]))
@click.option("--stage", default="stage2", type=click.Choice(["sft", "stage1", "stage2"]))
@click.option("--latent_size", default=4, help="k, latents a block.")
@click.option("--nodes", default="1,2,4,8,16,32,64,128", callback=_numbers, help="Numbers of nodes of 8 GPUs.")
@click.option("--tokens", default=8192, help="Tokens of a rank's micro-step.")
@click.option("--row_tokens", default=500, help="Tokens of a row.")
@click.option("--labelled", default=0.2, help="Share of the tokens with a label.")
@click.option("--micro_steps", default=1, help="Micro-steps of an optimizer step.")
@click.option("--used", default=0.4, help="Share of the peak FLOP/s that is reached.")
@click.option("--achieved", default=0.8, help="Share of the nominal link speeds that is reached.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw this PNG too.")
def main(model: str, latent_size: int, markdown: bool, figure: Path | None, **numbers: object) -> None:
    """Print traffic, memory, time bounds and batch sizes of a stage on 1 to 128 nodes."""
    asked = Question(model=sizes(read_shape(model)), k=latent_size, **numbers)  # type: ignore[arg-type]
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    for grid in grids(asked):
        if markdown:
            click.echo(f"**{model}, {asked.stage}. {grid.title}**\n\n{grid.markdown()}\n")
        else:
            console.print(grid.rich())
    if figure:
        title = f"{model}, {asked.stage}, k = {latent_size}, one micro-step of {asked.tokens} tokens a GPU"
        draw(asked, title, figure)


if __name__ == "__main__":
    main()
