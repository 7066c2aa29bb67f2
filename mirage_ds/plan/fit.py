"""Whether a DeepSpeed JSON fits, what bounds its step, and which of several is best.

T tokens of a rank's micro-batch, R rows of it, k latents a block, F image features, H hidden; W ranks; b bytes of an
element of the compute dtype.
"""

from bisect import bisect_left
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.config.run import HELPED
from mirage_ds.data.passes import schedule
from mirage_ds.engine.ds_config import read_json, recipes
from mirage_ds.model.chunks import chunk_budget
from mirage_ds.plan.activations import Micro, PassShape, Peak, Terms, peak, saved_terms, splits, total
from mirage_ds.plan.formulas import Machine, Step, step_cost, walk
from mirage_ds.plan.gpus import A100, H100_SXM, PEAKS
from mirage_ds.plan.rollout import recorded, reference, sampling, seconds
from mirage_ds.plan.settings import Settings, read_settings
from mirage_ds.plan.shape import Sizes, encoder_parameters, read_shape, sizes, trained_parameters
from mirage_ds.plan.spec import PlanSpec
from mirage_ds.plan.states import States, Written, states, written

GB = 1e9
MIB = 1 << 20
# Nominal; docs/scaling.md names the sources.
GPUS = {
    "h100": Machine("h100", 8, H100_SXM.bf16, 80e9, 3.35e12, 450e9, 400e9),
    "a100": Machine("a100", 8, A100.bf16, 40e9, 1.555e12, 300e9, 50e9),
    "h200": Machine("h200", 8, H100_SXM.bf16, 141e9, 4.8e12, 450e9, 400e9),
    "b200": Machine("b200", 8, PEAKS["B200"].bf16, 180e9, 8e12, 900e9, 400e9),
}
# Python with torch and DeepSpeed, CUDA's host side, two data-loader workers, of one rank: assumed, not measured.
PROCESS_BYTES = 4 * 10**9
# Node numbers that are tried where nothing fits.
MOST_NODES = 128


class Question:
    """A PlanSpec, worked out as far as it does not depend on the JSON.

    Attributes:
        machine: the GPUs and what lies between them; ranks: W.
        model: its elements; parameters: what is trained.
        micro: one rank's micro-batch.
        paths: the JSONs to choose from: the one given, or all recipes.
    """

    def __init__(self, spec: PlanSpec):
        shape = read_shape(spec.model)
        self.spec, self.machine, self.ranks = spec, _machine(spec), spec.nodes * spec.gpus_per_node
        heads = spec.stage == "rl" and spec.latent_policy == "gaussian"
        self.model, self.parameters = sizes(shape, heads), trained_parameters(shape, heads=heads)
        if spec.stage == "scaffold":
            self.parameters = encoder_parameters(self.model, spec.latent_size)
        self.micro = _micro(spec, self.model, self.machine)
        self.paths = recipes() if spec.deepspeed is None else [spec.deepspeed]


def _machine(spec: PlanSpec) -> Machine:
    said = {"memory": spec.gpu_memory, "hbm": spec.hbm, "nvlink": spec.nvlink, "nics": spec.network}
    said |= {"pcie": spec.pcie, "host": spec.host_bandwidth, "flops": spec.tflops and 1000 * spec.tflops}
    given: dict[str, Any] = {name: value * GB for name, value in said.items() if value is not None}
    return GPUS[spec.gpu]._replace(gpus=spec.gpus_per_node, operator=spec.operator_us / 1e6, **given)


def _micro(spec: PlanSpec, model: Sizes, machine: Machine) -> Micro:
    """Pack as many rows as fit, alike, each with all its latent blocks.

    The first block stands before the labelled tokens, the others spread over them evenly.
    """
    k, blocks = spec.latent_size, spec.latent_runs
    rows, first = spec.micro_batch_tokens // spec.row_tokens, int(spec.row_tokens * (1 - spec.labelled))
    apart = (spec.row_tokens - first) // blocks
    runs, passes = [(first + number * apart, k) for number in range(blocks)], 1
    if spec.recurrent:
        passes = walk("stage2", k, blocks, spec.latent_passes).passes
    # With the two tokens around each image.
    hidden = range(min(first, spec.images * (spec.image_tokens + 2)) if spec.bottleneck else 0)
    plans = schedule([spec.row_tokens] * rows, [runs] * rows, passes, spec.latent_passes, [hidden] * rows)
    # A latent's own place carries no label.
    alone = spec.stage == "sft" or (spec.stage == "rl" and spec.latent_policy == "text")
    labelled = spec.row_tokens - first - (0 if alone else k * blocks)
    return Micro(
        model,
        passes=tuple(PassShape(tuple(one.query_lengths), tuple(one.key_lengths), len(one.fed)) for one in plans),
        labelled=rows * labelled,
        rows=rows,
        grounded=rows * k * blocks if spec.stage == "stage1" else None,
        backend=spec.attention,
        checkpointing=spec.gradient_checkpointing,
        chunk_bytes=(spec.loss_chunk_mb or 0) * MIB or chunk_budget(machine.memory),
        features=rows * spec.images * spec.image_tokens,
        split=spec.recurrent and splits(model, spec.micro_batch_tokens),
        encoder=sum(map(sum, encoder_parameters(model, k))) if spec.stage == "scaffold" else 0,
        # Of a row's last pass: of the fed latents the last one predicts a label, of those behind it all but the last.
        handed_on=rows * labelled + plans[-1].fed.size - plans[-1].tokens.size if spec.recurrent else 0,
    )


class Held(NamedTuple):
    """Bytes of a GPU at its height, of a host, and of what is written.

    Attributes:
        states: model states of a rank.
        backward: what is there beside them in forward and backward, in the order in which it is said.
        phase: when that is at its height.
        saved, keys_values: of the activations, what the forward saved, and of that the earlier passes' keys and values.
        other_way: the whole height, were the last pass's own backward (Micro.split) chosen the other way.
        sampling: in rl, what is there in place of that while answers are sampled.
        tower: on the GPU; reference: likewise, in rl with a KL.
        reserve: what is kept free.
        host, host_start: of a node, running, and while rank 0 reads the weights.
        kept: features on disk, of all records.
        checkpoint: a sharded checkpoint's files.
    """

    states: States
    backward: Terms
    sampling: Terms
    phase: str
    saved: int
    keys_values: int
    other_way: int
    tower: int
    reference: int
    reserve: int
    host: Terms
    host_start: int
    kept: int
    checkpoint: Written

    @property
    def always(self) -> Terms:
        """What is on the GPU all the time."""
        others = {"frozen tower": self.tower, "reference (rl with a KL)": self.reference}
        return {**self.states.gpu, **others, "reserve": self.reserve}

    @property
    def gpu(self) -> int:
        """All of a GPU: the largest of backward, the optimizer's step and sampling, beside what is always there."""
        return total(self.always) + max(map(total, (self.backward, self.states.step, self.sampling)))


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
    micro = asked.micro._replace(width=b, checkpointing=checkpointing, resident=settings.resident(model))
    found = states(asked.parameters, settings, asked.ranks, spec.micro_steps * micro.backwards)
    saved, height = saved_terms(micro), peak(micro)
    if spec.stage == "scaffold":
        frozen = model.text * b // (asked.ranks if settings.stage == 3 else 1)
        place = found.host if settings.offload_parameters else found.gpu
        place["frozen weights (b Ψ / W under ZeRO-3)"] = frozen
    every_kept, helpers = spec.feature_cache == "all", spec.latent_runs if spec.stage in HELPED else 0
    tower = model.vision * b
    host = {name: spec.gpus_per_node * size for name, size in found.host.items() if size}
    if every_kept:
        host["frozen tower, a copy a rank"] = spec.gpus_per_node * tower
    if fed := recorded(spec, model, settings):
        host["recorded latents of a rollout, a copy a rank"] = fed
    host["processes (assumed)"] = spec.gpus_per_node * PROCESS_BYTES
    # DeepStack's features lie beside those of the embeddings; a helper's k targets have no part of it.
    feature = model.hidden * (1 + model.deep) * b
    kept = spec.images * spec.image_tokens * feature if every_kept else 0
    if spec.feature_cache != "off":
        # scaffold needs all features of a helper.
        kept += helpers * (spec.image_tokens * feature if micro.encoder else spec.latent_size * model.hidden * b)
    saved_files = written(asked.parameters, settings, asked.ranks)
    if spec.async_save:
        writers = min(spec.gpus_per_node, saved_files.ranks)
        host["a checkpoint's copy (--async_save)"] = saved_files._replace(ranks=writers).all
    return Held(
        states=found,
        backward=_backward(asked, settings, height),
        sampling=sampling(spec, model, settings, asked.ranks),
        phase=height.phase,
        saved=total(saved),
        keys_values=sum(size for name, size in saved.items() if name.startswith("keys and values")),
        other_way=peak(micro._replace(split=not micro.split)).total,
        tower=0 if every_kept else tower,
        reference=reference(spec, model, settings, asked.ranks),
        reserve=int(spec.reserve * GB),
        host=host,
        host_start=(model.text + model.vision) * b + spec.gpus_per_node * (tower + PROCESS_BYTES),
        kept=spec.rows * kept,
        checkpoint=saved_files,
    )


def _backward(asked: Question, settings: Settings, height: Peak) -> Terms:
    """Name what is on a GPU beside the model states in forward and backward."""
    spec, model, zero, b = asked.spec, asked.model, settings.zero, settings.compute
    gathered = 0
    if settings.stage == 3:
        # Whatever the limits, embedding and head are gathered whole: at 3B and 7B more than two layers. Those of kept
        # weights that stay from step to step are among the states.
        small = sum(n for n in chain(*asked.parameters) if n <= zero.persistence) if zero.resident(model) else 0
        gathered = max(zero.live(model), model.embedding) - small
    # Of input images; in stage1 of each helper too, or its targets if kept.
    helper = spec.image_tokens if spec.feature_cache == "off" or spec.stage == "scaffold" else spec.latent_size
    helpers = asked.micro.rows * helper * (spec.latent_runs if spec.stage in HELPED else 0)
    return {
        "gathered parameters": gathered * b,
        "left to the first pass's gradients (stage2)": height.deferred,
        "copy of a bucket while it is reduced": min(zero.bucket, model.text) * b if settings.stage == 3 else 0,
        "activations at the height": height.activations,
        "logits chunk and the head's gradient": height.head,
        "image features of the micro-batch": (asked.micro.features + helpers) * model.hidden * (1 + model.deep) * b,
    }


def _problem(asked: Question, held: Held) -> str | None:
    """Name the first thing that is too large."""
    if held.states.obstacle:
        return held.states.obstacle
    for phase in (held.backward, held.states.step, held.sampling):
        so_far = 0
        for name, size in {**held.always, **phase}.items():
            so_far += size
            if so_far > asked.machine.memory:
                return f"{name}, {size / GB:.0f} GB"
    room = asked.spec.host_memory
    reading = "RAM of the host that reads the weights"
    for name, needed in (("RAM of a host", total(held.host)), (reading, held.host_start)):
        if needed > room * GB:
            return f"{name}: {needed / GB:,.0f} of {room:,.0f} GB"
    return None


def judge(asked: Question, path: Path) -> Plan:
    """Work one JSON out.

    Raises:
        UserError: the JSON cannot be read, or DeepSpeed would refuse it.
    """
    spec = asked.spec
    settings = read_settings(read_json(path), path, asked.model)
    held = held_by(asked, settings, spec.gradient_checkpointing)
    step = step_cost(asked.micro, spec.micro_steps, settings, asked.machine, spec.nodes, spec.used, spec.achieved)
    more = (spec, asked.model, settings.compute, asked.ranks, asked.machine.hbm, step.seconds["arithmetic"])
    step.seconds.update(seconds(*more))
    return Plan(path.name, settings, held, step, _problem(asked, held))


def _worth(asked: Question, plan: Plan) -> tuple[bool, bool, float, float]:
    """Order: what fits, fp32 states before bf16 ones, by seconds to three digits, then by room; the rest by size."""
    seconds = float(f"{plan.step.most:.3g}") if plan.problem is None else 0.0
    return plan.problem is not None, not plan.settings.moves_all_weights, seconds, plan.held.gpu


def rank(asked: Question) -> list[Plan]:
    """Judge all JSONs, the best first."""
    return sorted((judge(asked, path) for path in asked.paths), key=lambda plan: _worth(asked, plan))


def advice(asked: Question) -> list[str]:
    """Say what would make something fit where nothing does: fewer tokens, more nodes, larger GPUs."""

    def some(**changed: Any) -> str | None:
        best = rank(Question(asked.spec.model_copy(update=changed)))[0]
        return best.name if best.problem is None else None

    spec, said = asked.spec, []
    if not spec.gradient_checkpointing and (name := some(gradient_checkpointing=True)):
        said.append(f"--gradient_checkpointing ({name})")
    fewer = range(spec.row_tokens, spec.micro_batch_tokens - spec.row_tokens + 1, spec.row_tokens)
    if low := bisect_left(fewer, True, key=lambda tokens: some(micro_batch_tokens=tokens) is None):
        tokens = fewer[low - 1]
        said.append(f"--micro_batch_tokens {tokens} ({some(micro_batch_tokens=tokens)})")
    for nodes in (spec.nodes << power for power in range(1, MOST_NODES.bit_length())):
        if nodes <= MOST_NODES and (name := some(nodes=nodes)):
            said.append(f"--nodes {nodes} ({name})")
            break
    possible = [plan for plan in rank(asked) if not plan.held.states.obstacle]
    if possible:
        least = min(possible, key=lambda plan: plan.held.gpu)
        said.append(f"GPUs of {least.held.gpu / GB:.0f} GB ({least.name})")
    return said
