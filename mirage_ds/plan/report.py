"""What the planner tells: tables for people, one JSON object for programs."""

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirage_ds.plan.activations import total
from mirage_ds.plan.fit import GB, Held, Plan, Question, held_by
from mirage_ds.plan.formulas import HOST
from mirage_ds.plan.spec import PlanSpec

# Wider terminals gain nothing.
WIDTH = 100
COLOURS = {True: "green", False: "bold red"}


def _gb(size: float) -> str:
    if 0 < size < 0.005 * GB:
        return "< 0.01"
    return f"{size / GB:,.2f}" if size < 10 * GB else f"{size / GB:,.1f}"


def _table(*columns: str, right: Sequence[int] = (), whole: Sequence[int] = ()) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for number, title in enumerate(columns):
        justify: Literal["left", "right"] = "right" if number in right else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=number in whole)
    return table


def headline(asked: Question) -> str:
    """Return the question in one line."""
    spec, micro, model = asked.spec, asked.micro, asked.model
    k = f", k = {spec.latent_size}" if spec.stage != "sft" else ""
    runs = f" x {spec.latent_runs} latent blocks" if spec.latent_runs > 1 else ""
    trained = micro.encoder or model.text
    frozen = model.text + model.vision - (0 if micro.encoder else trained)
    own = (" --feed own" if spec.feed == "own" else "") + (" --bottleneck" if spec.bottleneck else "")
    k += "" if spec.latent_passes is None else f" in {spec.latent_passes} passes together"
    return (
        f"{spec.model}: {trained / 1e9:.2f} B trained, {frozen / 1e9:.2f} B frozen; {spec.stage}{own}{k}{runs}; "
        f"{spec.nodes} x {spec.gpus_per_node} {spec.gpu} of {asked.machine.memory / GB:.0f} GB; "
        f"{micro.tokens:,} tokens ({micro.rows} rows) a GPU and micro-step, {spec.micro_steps} micro-step(s)"
    )


def ranking(asked: Question, plans: Sequence[Plan]) -> Table:
    """Draw one line a JSON, the best first."""
    titles = ("", "JSON", "GPU\nGB", "free\nGB", "moved\nGB", "least\ns", "most\ns", "bound by, or too large")
    table = _table(*titles, right=range(2, 7), whole=range(7))
    for plan in plans:
        fits, step, held = plan.problem is None, plan.step, plan.held.gpu
        sizes = held, asked.machine.memory - held, max(step.network_bytes, step.nvlink_bytes)
        remark = step.bound if fits else f"too large: {plan.problem}"
        if not plan.settings.moves_all_weights:
            remark += " (bf16 states)"
        table.add_row(
            Text("fits" if fits else "no", COLOURS[fits]),
            plan.name.removesuffix(".json"),
            *(f"{size / GB:.0f}" for size in sizes),
            *(f"{seconds:.2f}" for seconds in (step.least, step.most)),
            Text(remark),
        )
    return table


def gpu_table(asked: Question, plan: Plan) -> Table:
    """Draw one GPU's memory, with and without gradient checkpointing."""
    on, off = (held_by(asked, plan.settings, checkpointing) for checkpointing in (True, False))
    table = _table(f"per GPU, GB ({plan.name})", "checkpointing", "without", right=(1, 2))

    def row(name: str, *sizes: int, style: str = "") -> None:
        if any(sizes):
            table.add_row(Text(name), *map(_gb, sizes), style=style)

    for name, size in on.always.items():
        if name != "reserve":
            row(name, size, size)
    for name, size in on.backward.items():
        row(name, size, off.backward[name])
        if name.startswith("activations"):
            row("  (saved when the forward ends)", on.saved, off.saved, style="dim")
            if on.keys_values:
                row("  (of it keys and values)", on.keys_values, off.keys_values, style="dim")
    if asked.spec.recurrent:
        own = "left" if asked.micro.split else "in an own backward"
        row(f"(last pass {own}: height with head)", on.other_way, off.other_way, style="dim")
    row("(optimizer step; counts only if larger)", total(on.states.step), style="dim")
    for name, size in on.sampling.items():
        row(f"(rollout: {name})", size, style="dim")
    table.add_row("reserve (CUDA, NCCL, allocator)", _gb(on.reserve), _gb(on.reserve))
    table.add_section()
    room = asked.machine.memory
    sums = [Text(_gb(held.gpu), COLOURS[held.gpu <= room]) for held in (on, off)]
    table.add_row(Text(f"all, of {room / GB:.0f}", "bold"), *sums)
    return table


def host_table(asked: Question, plan: Plan) -> Table:
    """Draw a host's memory and the disks."""
    held, spec = plan.held, asked.spec
    table = _table("per host, GB", "", "disks, GB", "", right=(1, 3))
    host = held.host | {"all": total(held.host), "at the start, rank 0's host": held.host_start}
    left = [(name, _gb(size)) for name, size in host.items()]
    files, seconds = held.checkpoint, _checkpoint_seconds(spec, held)
    right = [
        (f"kept features of {spec.rows:,} records", _gb(held.kept)),
        ("a checkpoint", _gb(files.all)),
        (f"  optimizer, each of {files.ranks} rank(s)", _gb(files.optimizer)),
        *([("  weights, by rank 0", _gb(files.weights))] if files.weights else []),
        (f"  seconds to write it at {spec.storage:g} GB/s", f"{seconds['seconds']:.1f}"),
        *([(f"  seconds to copy it at {spec.pcie:g} GB/s", f"{seconds['held']:.1f}")] if spec.async_save else []),
    ]
    for (name, size), (other, said) in zip_longest(left, right, fillvalue=("", "")):
        table.add_row(Text(name), size, Text(other), said)
    return table


def _checkpoint_seconds(spec: PlanSpec, held: Held) -> dict[str, float]:
    """Seconds from a checkpoint's begin to its end, and those of them in which no step is taken."""
    seconds = held.checkpoint.all / GB / spec.storage
    # Each rank copies its own; rank 0 has the most.
    copy = (held.checkpoint.weights + held.checkpoint.optimizer) / GB / spec.pcie
    return {"seconds": seconds + copy, "held": copy} if spec.async_save else {"seconds": seconds, "held": seconds}


def step_table(asked: Question, plan: Plan) -> Table:
    """Draw an optimizer step: seconds that each thing takes at least."""
    step, spec = plan.step, asked.spec
    table = _table("one optimizer step", "", "s", right=(1, 2))
    said = {
        "arithmetic": f"{step.flops / 1e12:,.0f} TFLOP a GPU, {spec.used:.0%} of the peak",
        "NVLink": f"{step.nvlink_bytes / GB:,.1f} GB a GPU, {spec.achieved:.0%} of the speed",
        "network": f"{step.network_bytes / GB:,.1f} GB a host, {spec.achieved:.0%} of the speed",
        HOST: f"{step.operators:,} operators, {spec.operator_us:g} µs each",
    }
    for name, seconds in step.seconds.items():
        mark = "  longest" if name == step.bound else ""
        if mark and name == HOST:
            mark += ": the GPU waits for it"
        table.add_row(f"{name}{mark}", said.get(name, ""), f"{seconds:.2f}")
    rows = asked.micro.rows * asked.ranks * spec.micro_steps
    table.add_section()
    bounds = f"{step.least:.2f} / {step.most:.2f}"
    table.add_row("all hidden behind the longest / nothing hidden", f"{rows:,} rows a step", bounds)
    return table


def print_tables(asked: Question, plans: Sequence[Plan], advice: Sequence[str]) -> None:
    """Print the ranking, then the first JSON's numbers, then what to do where nothing fits."""
    console = Console()
    console.width = min(console.width, WIDTH)
    console.print(headline(asked), markup=False, highlight=False)
    console.print(ranking(asked, plans), highlight=False)
    for draw in (gpu_table, host_table, step_table):
        console.print(draw(asked, plans[0]), highlight=False)
    console.print(closing(plans, advice), markup=False, highlight=False, soft_wrap=True)


def closing(plans: Sequence[Plan], advice: Sequence[str]) -> str:
    """Return the last line: what to take, or what to change."""
    best = plans[0]
    if best.problem is None:
        return f"take {best.name}; numbers are computed, `mirage-ds docs plan` says how far they were tested"
    if not advice:
        return f"nothing fits, nor would it with fewer tokens or more nodes: {best.name}: {best.problem}"
    return f"nothing fits; any one of these would: {', '.join(advice)}"


def as_json(asked: Question, plans: Sequence[Plan], advice: Sequence[str]) -> str:
    """Return everything as one JSON object, in bytes and seconds."""
    return json.dumps(
        {
            "question": asked.spec.model_dump(mode="json"),
            "model": {
                "trained": asked.micro.encoder or asked.model.text,
                "frozen": asked.model.vision + (asked.model.text if asked.micro.encoder else 0),
                "layers": asked.model.layers,
                "passes": len(asked.micro.passes),
                "ranks": asked.ranks,
            },
            "micro_batch": {
                "tokens": asked.micro.tokens,
                "rows": asked.micro.rows,
                "labelled": asked.micro.labelled,
                "queries_of_passes": [one.tokens for one in asked.micro.passes],
            },
            "plans": [_plan(asked, plan) for plan in plans],
            "fits": plans[0].problem is None,
            "advice": list(advice),
        },
        indent=1,
        ensure_ascii=False,
    )


def _gpu(asked: Question, held: Held) -> dict[str, Any]:
    return {
        "states": held.states.gpu,
        "frozen tower": held.tower,
        "reference": held.reference,
        "rollout instead of backward": held.sampling,
        "backward": held.backward,
        "height": held.phase,
        "saved by the forward": held.saved,
        "keys and values of earlier passes": held.keys_values,
        "last pass has its own backward": asked.micro.split,
        "activations, head and deferred the other way": held.other_way,
        "optimizer step instead of backward": held.states.step,
        "reserve": held.reserve,
        "all": held.gpu,
    }


def _plan(asked: Question, plan: Plan) -> dict[str, Any]:
    held, step = plan.held, plan.step
    return {
        "json": plan.name,
        "fits": plan.problem is None,
        "problem": plan.problem,
        "fp32_states": plan.settings.moves_all_weights,
        "gpu": _gpu(asked, held),
        "gpu_with_checkpointing_the_other_way": _gpu(
            asked, held_by(asked, plan.settings, not asked.spec.gradient_checkpointing)
        ),
        "host": {**held.host, "all": total(held.host), "at the start": held.host_start},
        "kept_features": held.kept,
        "checkpoint": {
            "bytes": held.checkpoint.all,
            **held.checkpoint._asdict(),
            **_checkpoint_seconds(asked.spec, held),
        },
        "step": {**step._asdict(), "bound": step.bound, "least": step.least, "most": step.most},
    }
