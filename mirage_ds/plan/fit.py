"""Whether a DeepSpeed JSON fits, what bounds its step, and which of several is best.

T tokens of a rank's micro-batch, R rows of it, k latents a block, F image features, H hidden; W ranks; b bytes of an
element of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.data.passes import schedule
from mirage_ds.engine.ds_config import read_json, recipes
from mirage_ds.model.shape import Shape
from mirage_ds.plan.activations import Micro, PassShape, Peak, peak, saved_terms, total
from mirage_ds.plan.formulas import Machine, Step, Walk, Work, step_cost, walk
from mirage_ds.plan.gpus import A100, H100_SXM
from mirage_ds.plan.settings import Settings, read_settings
from mirage_ds.plan.shape import Parameter, Sizes, read_shape, sizes, trained_parameters
from mirage_ds.plan.spec import PlanSpec
from mirage_ds.plan.states import States, states

GB = 1e9
MIB = 1 << 20
# Nominal; docs/scaling.md names the sources.
CARDS = {
    "h100": Machine("h100", 8, H100_SXM.bf16, 80e9, 3.35e12, 450e9, 400e9),
    "a100": Machine("a100", 8, A100.bf16, 40e9, 1.555e12, 300e9, 50e9),
}
# Python with torch and DeepSpeed, CUDA's host side, two data-loader workers, of one rank: assumed, not measured.
PROCESS_BYTES = 4 * 10**9
# Node numbers that are tried where nothing fits.
MOST_NODES = 128


class Question:
    """A PlanSpec, worked out as far as it does not depend on the JSON."""

    def __init__(self, spec: PlanSpec):
        self.spec = spec
        said = {"memory": spec.gpu_memory, "hbm": spec.hbm, "nvlink": spec.nvlink, "nics": spec.network}
        given: dict[str, Any] = {name: value * GB for name, value in said.items() if value is not None}
        if spec.tflops is not None:
            given["flops"] = spec.tflops * 1e12
        given |= {"gpus": spec.gpus_per_node, "pcie": spec.pcie * GB, "host": spec.host_bandwidth * GB}
        self.machine = CARDS[spec.card]._replace(**given)

    @cached_property
    def shape(self) -> Shape:
        """The model."""
        return read_shape(self.spec.model)

    @cached_property
    def model(self) -> Sizes:
        """Its elements."""
        return sizes(self.shape)

    @cached_property
    def parameters(self) -> list[Parameter]:
        """What is trained."""
        return trained_parameters(self.shape)

    @property
    def ranks(self) -> int:
        """W."""
        return self.spec.nodes * self.spec.gpus_per_node

    @property
    def walked(self) -> Walk:
        """Walks over the layers."""
        return walk(self.spec.stage, self.spec.latent_size, self.spec.latent_runs)

    @cached_property
    def micro(self) -> Micro:
        """One rank's micro-batch: as many rows as fit, alike, each with all its latent blocks.

        The first block stands before the labelled tokens, the others spread over them evenly.
        """
        spec, k = self.spec, self.spec.latent_size
        rows, first = spec.micro_batch_tokens // spec.row_tokens, int(spec.row_tokens * (1 - spec.labelled))
        apart = (spec.row_tokens - first) // spec.latent_runs
        blocks = [(first + number * apart, k) for number in range(spec.latent_runs)] if spec.stage == "stage2" else []
        plans = schedule([spec.row_tokens] * rows, [blocks] * rows, self.walked.passes)
        # A latent's own place carries no label.
        labelled = spec.row_tokens - first - (0 if spec.stage == "sft" else k * spec.latent_runs)
        return Micro(
            passes=tuple(PassShape(tuple(one.query_lengths), tuple(one.key_lengths)) for one in plans),
            labelled=rows * labelled,
            rows=rows,
            grounded=rows * k * spec.latent_runs if spec.stage == "stage1" else None,
        )

    @property
    def features(self) -> int:
        """F of a micro-batch: of input images, in stage1 of each helper too, or its targets if kept."""
        spec = self.spec
        helpers = spec.latent_runs if spec.stage == "stage1" else 0
        helper = spec.image_tokens if spec.feature_cache == "off" else spec.latent_size
        return self.micro.rows * (spec.images * spec.image_tokens + helpers * helper)

    @property
    def work(self) -> Work:
        """The step as arithmetic sees it; a token sees half a row on the average."""
        return Work(
            walked=self.walked,
            micro_steps=self.spec.micro_steps,
            tokens=self.micro.tokens,
            labelled=self.micro.labelled,
            keys=self.micro.tokens / self.micro.rows / 2,
            checkpointing=self.spec.gradient_checkpointing,
        )


class Held(NamedTuple):
    """Bytes of a GPU at its height, of a host, and of what is written.

    Attributes:
        states: model states of a rank.
        gathered: whole weights at one time (ZeRO-3), without the small ones that always are.
        reduced: the copy of a bucket while it is reduced.
        height: activations, head and whole gradients.
        saved, keys_values: of the activations, what the forward saved, and of that the earlier passes' keys and values.
        features, tower: on the GPU.
        reserve: what is kept free.
        host, host_start: of a node, running, and while rank 0 reads the weights.
        kept: features on disk, of all records.
        checkpoint: a sharded checkpoint.
    """

    states: States
    gathered: int
    reduced: int
    height: Peak
    saved: int
    keys_values: int
    features: int
    tower: int
    reserve: int
    host: dict[str, int]
    host_start: int
    kept: int
    checkpoint: int

    @property
    def backward(self) -> dict[str, int]:
        """What is there beside the states in forward and backward, in the order in which it is said."""
        return {
            "gathered parameters": self.gathered,
            "whole gradients of all layers (stage2)": self.height.gradients,
            "copy of a bucket while it is reduced": self.reduced,
            "activations at the height": self.height.activations,
            "logits chunk and the head's gradient": self.height.head,
            "image features of the micro-batch": self.features,
        }

    @property
    def gpu(self) -> int:
        """All of a GPU: the larger of backward and the optimizer's step, beside what is always there."""
        always = total(self.states.gpu) + self.tower + self.reserve
        return always + max(total(self.backward), total(self.states.step))


class Plan(NamedTuple):
    """One JSON, judged.

    Attributes:
        name: of the file.
        held, step: its numbers.
        problem: why it does not fit, or None.
    """

    name: str
    settings: Settings
    held: Held
    step: Step
    problem: str | None


def held_by(asked: Question, settings: Settings, checkpointing: bool) -> Held:
    """Count what one rank, its node and the disks hold."""
    spec, model, b = asked.spec, asked.model, settings.compute
    found = states(asked.parameters, settings, asked.ranks, spec.micro_steps)
    saved = saved_terms(model, asked.micro, b, spec.attention, checkpointing)
    inputs = asked.micro.rows * spec.images * spec.image_tokens
    chunk = spec.loss_chunk_mb * MIB
    height = peak(model, asked.micro, b, spec.attention, checkpointing, chunk, "cuda", inputs)
    gathered = reduced = 0
    if settings.stage == 3:
        # Whatever the limits, embedding and head are gathered whole: at 3B and 7B more than two layers.
        live = max(settings.zero.live(model), model.embedding)
        small = sum(one.elements for one in asked.parameters if one.elements <= settings.zero.persistence)
        gathered = (live - small if settings.zero.keeps(model) else live) * b
        reduced = min(settings.zero.bucket, model.text) * b
    if settings.whole_sums or (settings.stage == 0 and spec.micro_steps == 1):
        # They are among the states already: autograd's sums become the parameters' own gradients.
        height = height._replace(gradients=0)
    every_kept = spec.feature_cache == "all"
    tower = model.vision * b
    host = {name: spec.gpus_per_node * size for name, size in found.host.items() if size}
    if every_kept:
        host["frozen tower, a copy a rank"] = spec.gpus_per_node * tower
    host["processes (assumed)"] = spec.gpus_per_node * PROCESS_BYTES
    # DeepStack's features lie beside those of the embeddings.
    feature = model.hidden * (1 + model.deep) * b
    kept = spec.images * spec.image_tokens * feature if every_kept else 0
    if spec.stage == "stage1" and spec.feature_cache != "off":
        # Of a helper its k targets, of which DeepStack has no part.
        kept += spec.latent_runs * spec.latent_size * model.hidden * b
    optimizer = (settings.master + 2 * settings.moments) * model.text
    return Held(
        states=found,
        gathered=gathered,
        reduced=reduced,
        height=height,
        saved=total(saved),
        keys_values=sum(size for name, size in saved.items() if name.startswith("keys and values")),
        features=asked.features * feature,
        tower=0 if every_kept else tower,
        reserve=int(spec.reserve * GB),
        host=host,
        host_start=(model.text + model.vision) * b + spec.gpus_per_node * (tower + PROCESS_BYTES),
        kept=spec.rows * kept,
        # ZeRO-3's shards hold the optimizer alone; the others also write the weights of the forward.
        checkpoint=optimizer + (0 if settings.stage == 3 else b * model.text),
    )


def _problem(asked: Question, held: Held) -> str | None:
    """Name the first thing that is too large."""
    if held.states.obstacle:
        return held.states.obstacle
    room, so_far = asked.machine.memory, 0
    parts = {**held.states.gpu, "frozen tower": held.tower, "reserve": held.reserve}
    for phase in (held.backward, held.states.step):
        so_far = 0
        for name, size in {**parts, **phase}.items():
            so_far += size
            if so_far > room:
                return f"{name}, {size / GB:.0f} GB"
    for name, needed, given in (
        ("RAM of a host", total(held.host), asked.spec.host_memory),
        ("RAM of the host that reads the weights", held.host_start, asked.spec.host_memory),
    ):
        if needed > given * GB:
            return f"{name}: {needed / GB:,.0f} of {given:,.0f} GB"
    return None


def judge(asked: Question, path: Path) -> Plan:
    """Work one JSON out.

    Raises:
        UserError: the JSON cannot be read, or DeepSpeed would refuse it.
    """
    spec = asked.spec
    settings = read_settings(read_json(path), path, asked.model)
    held = held_by(asked, settings, spec.gradient_checkpointing)
    step = step_cost(asked.model, asked.work, settings, asked.machine, spec.nodes, spec.used, spec.achieved)
    return Plan(path.name, settings, held, step, _problem(asked, held))


def _worth(asked: Question, plan: Plan) -> tuple[bool, bool, float, float]:
    """Order: what fits, fp32 states before bf16 ones, by seconds to three digits, then by room; the rest by size."""
    seconds = float(f"{plan.step.most:.3g}") if plan.problem is None else 0.0
    return plan.problem is not None, not plan.settings.moves_all_weights, seconds, plan.held.gpu


def rank(asked: Question, paths: Sequence[Path]) -> list[Plan]:
    """Judge several JSONs, the best first."""
    return sorted((judge(asked, path) for path in paths), key=lambda plan: _worth(asked, plan))


def advice(asked: Question, paths: Sequence[Path]) -> list[str]:
    """Say what would make something fit where nothing does: fewer tokens, more nodes, larger GPUs."""

    def some(**changed: Any) -> str | None:
        other = Question(asked.spec.model_copy(update=changed))
        return next((plan.name for plan in rank(other, paths) if plan.problem is None), None)

    spec, said = asked.spec, []
    low, high = 0, spec.micro_batch_tokens // spec.row_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if some(micro_batch_tokens=middle * spec.row_tokens) else (low, middle)
    if low:
        tokens = low * spec.row_tokens
        said.append(f"--micro_batch_tokens {tokens} ({some(micro_batch_tokens=tokens)})")
    nodes = spec.nodes * 2
    while nodes <= MOST_NODES:
        if name := some(nodes=nodes):
            said.append(f"--nodes {nodes} ({name})")
            break
        nodes *= 2
    plans = [plan for plan in rank(asked, paths) if not plan.held.states.obstacle]
    if plans:
        least = min(plans, key=lambda plan: plan.held.gpu)
        said.append(f"GPUs of {least.held.gpu / GB:.0f} GB ({least.name})")
    if not spec.gradient_checkpointing and (name := some(gradient_checkpointing=True)):
        said.insert(0, f"--gradient_checkpointing ({name})")
    return said


def chosen(spec: PlanSpec) -> list[Path]:
    """Return the JSONs that are asked about: the one given, or all recipes."""
    return recipes() if spec.deepspeed is None else [spec.deepspeed]
