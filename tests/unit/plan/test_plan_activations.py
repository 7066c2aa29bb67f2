"""The planner's saved activations against what autograd really keeps.

Two oracles that share nothing with the formulas: saved-tensor hooks, and all storages that are alive.

T tokens, N rows, k latents a run, H hidden, b bytes of an element.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from support.pairs import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.model.attention import INTERFACE_NAME, register
from mirage_ds.model.family import FAMILIES
from mirage_ds.model.forward import Forward, MirageModel
from mirage_ds.model.loss import LossHead, StepCounts, objective
from mirage_ds.model.presets import preset
from mirage_ds.plan.activations import Micro, PassShape, peak, saved_terms, total
from mirage_ds.plan.shape import Sizes, describe, sizes

VOCABULARY = 700
# One image of four merged features a row, as many of each helper.
FEATURES = 4
# (length, place of the first latent of each run): different lengths, one row without latents.
ROWS = ((31, (11,)), (31, (13,)), (57, (20,)), (23, ()))
WIDE = ((97, (31,)), (75, (40,)), (75, (40,)), (49, ()))
# Long answers, one row with two runs.
LATE = ((97, (7,)), (60, (6, 30)))


def shape(name: str, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Nano of a family, or a mid model: hidden 256, 4 layers, untied; sizes that share no factor by accident."""
    config = preset("nano" if name == "mid" else name)
    config["text_config"]["vocab_size"] = vocabulary
    if name == "mid":
        config["text_config"] |= dict(
            hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, intermediate_size=704,
            tie_word_embeddings=False,
        )  # fmt: skip
        config["vision_config"]["out_hidden_size"] = 256
        config["tie_word_embeddings"] = False
    return config


def counted(name: str, vocabulary: int = VOCABULARY) -> Sizes:
    return sizes(describe(shape(name, vocabulary), name))


@cache
def whole(name: str, dtype: torch.dtype, vocabulary: int = VOCABULARY) -> Any:
    family = FAMILIES[shape(name)["model_type"]]
    register()
    torch.manual_seed(0)
    model = family.model_class()(family.config_class()(**shape(name, vocabulary))).to(dtype)
    for layer in model.model.language_model.layers:
        layer.self_attn.config._attn_implementation = INTERFACE_NAME
    return model


def model_of(name: str, stage: str, dtype: torch.dtype, way: str) -> MirageModel:
    model = whole(name, dtype)
    model.zero_grad(set_to_none=True)
    head = LossHead(model.lm_head.weight, CHUNK_BYTES)
    how = Forward(stage.startswith("stage1"), "sample", "sdpa", way != "whole", split=way == "split")
    made = MirageModel(model.model.language_model, head, None, how)
    # As under ZeRO-3, where layers are gathered for each use.
    made.layers.resident = lambda: way != "released"
    return made


def sample(row: int, length: int, runs: tuple, hidden: int, dtype: torch.dtype, images: int, helped: bool) -> Sample:
    ids = torch.randint(0, VOCABULARY, (length,))
    labels = torch.full((length,), IGNORE)
    first = runs[0][0] if runs else length // 2
    labels[first - 1 :] = ids[first - 1 :]
    for start, k in runs:
        labels[start : start + k] = IGNORE
    pixels, no_grid = torch.empty(0, 1176), torch.empty(0, 3, dtype=torch.int64)
    return Sample(
        row=row, input_ids=ids, labels=labels, position_ids=torch.arange(length).expand(3, -1).clone(),
        image_positions=torch.arange(1, 1 + images), pixel_values=pixels, image_grid_thw=no_grid, runs=runs,
        helper_pixel_values=pixels,
        helper_grid_thw=torch.tensor([[1, 4, 4]] * len(runs)).reshape(-1, 3) if helped else no_grid,
        helper_groups=torch.cat(
            [torch.arange(FEATURES * helped) // (FEATURES // k) + run * k for run, (_, k) in enumerate(runs)]
            or [torch.empty(0, dtype=torch.int64)]
        ),
        image_features=torch.randn(images, hidden).to(dtype),
        helper_features=torch.randn(FEATURES * len(runs) * helped, hidden).to(dtype),
    )  # fmt: skip


def batch_of(name: str, stage: str, k: int, dtype: torch.dtype) -> Batch:
    vision = shape(name)["vision_config"]
    # DeepStack's features lie beside those of the embeddings.
    hidden = shape(name)["text_config"]["hidden_size"] * (1 + len(vision.get("deepstack_visual_indexes", ())))
    rows = LATE if k == 3 else WIDE if name == "mid" else ROWS
    if stage.startswith("stage1"):
        rows = tuple(row for row in rows if row[1])
    made = [
        sample(i, length, tuple((place, k) for place in places), hidden, dtype, FEATURES, stage.startswith("stage1"))
        for i, (length, places) in enumerate(rows)
    ]
    if stage.endswith("hidden"):
        made = [one._replace(hidden=torch.arange(2 + FEATURES)) for one in made]
    dummy = sample(-1, k + 2, ((1, k),), hidden, dtype, 0, stage.startswith("stage1"))
    return collate(made, k * max(len(places) for _, places in rows) + 1 if stage.startswith("stage2") else 1, dummy)


def micro_of(name: str, batch: Batch, stage: str, dtype: torch.dtype, way: str, **options: int) -> Micro:
    passes = tuple(
        PassShape(tuple(one.cu_q.diff().tolist()), tuple(one.cu_k.diff().tolist()), len(one.fed))
        for one in batch.passes
    )
    grounded = len(batch.latents) if stage.startswith("stage1") else None
    return Micro(
        counted(name, options.get("vocabulary", VOCABULARY)), passes, len(batch.targets), len(batch.rows), grounded,
        dtype.itemsize, "sdpa", way != "whole", options.get("chunk_bytes", CHUNK_BYTES), "cpu",
        len(batch.image_positions), way != "released", way == "split",
        sum(len(one.labelled) for one in batch.passes[:-1]),
    )  # fmt: skip


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from tensors(part)


class Live(TorchDispatchMode):
    """Bytes of all storages that were made while it lasts and are still alive, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tensors(list(args) + list((kwargs or {}).values()))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.now -= size


# "hidden": text behind latents does not see the images.
CASES = [("sft", 2), ("stage1", 2), ("stage1", 4), ("stage2", 2), ("stage2", 4), ("stage2", 3)]
CASES += [("stage1 hidden", 2), ("stage2 hidden", 3)]
# What an element's bytes and k = 4 change shows in the family of the presets.
DTYPES = {
    "nano": (torch.float32, torch.bfloat16),
    "mid": (torch.bfloat16,),
    "nano-qwen2-vl": (torch.float32,),
    "nano-qwen3-vl": (torch.float32,),
}
CHUNK_BYTES = 1 << 16
# Layers are not checkpointed; checkpointed but in thin passes; checkpointed in all; a last pass with its own backward.
WAYS = ("whole", "resident", "released", "split")
EVERY = [
    (name, case, dtype, way)
    for name, dtypes in DTYPES.items()
    for case in CASES
    if case[1] < 4 or name in ("nano", "mid")
    for dtype in dtypes
    for way in WAYS[: 4 if case[0].startswith("stage2") else 2]
]
# Each two of model, stage with k, dtype and way meet.
every_pair = pytest.mark.parametrize(
    ("name", "stage", "k", "dtype", "way"), [(name, *case, dtype, way) for name, case, dtype, way in pairwise(EVERY)]
)


class Measured(NamedTuple):
    """Bytes of one forward and backward: saved through hooks, alive after the forward, at the height, in the end."""

    hooked: int
    alive: int
    height: int
    left: int


@cache
def measure(name: str, stage: str, k: int, dtype: torch.dtype, way: str) -> Measured:
    batch, model = batch_of(name, stage, k, dtype), model_of(name, stage, dtype, way)
    there = [*model.parameters(), *model.buffers(), *tensors(batch)]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    # Of addresses and sizes alone: what is saved stays where it is, and what is not must be free to go.
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # As ZeRO does: a gradient goes away as soon as it is complete.
    gone = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters()]
    with Live() as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sums = model(batch)
            loss = objective(sums, StepCounts(4, 40, 8), 0.1, "sample")[0]
        alive = live.now
        loss.backward()
        if sums.earlier is not None:
            sums.earlier.backward()
    for hook in gone:
        hook.remove()
    # The loss is still held.
    return Measured(sum(saved.values()), alive, live.peak, live.now)


@every_pair
def test_saved_is_what_hooks_count(name: str, stage: str, k: int, dtype: torch.dtype, way: str) -> None:
    micro = micro_of(name, batch_of(name, stage, k, dtype), stage, dtype, way)
    # The head keeps the gradients that it makes, and a cut what it cuts, out of the hooks' sight. They are alive (next
    # test).
    unseen = ("gradient of", "labelled states of")
    terms = {name: size for name, size in saved_terms(micro).items() if not name.startswith(unseen)}
    if way != "whole":
        # So does a checkpoint with what lies in tuples and lists. Thin passes save cos, sin, and all keys and values.
        thin = sum(one.tokens for number, one in enumerate(micro.passes) if micro.thin(number))
        for term, size in terms.items():
            if term.startswith("rotary"):
                terms[term] = size * thin // micro.tokens
            elif term.startswith("keys and values of") and not thin:
                terms[term] = 0
    assert measure(name, stage, k, dtype, way).hooked == total(terms)


@every_pair
def test_saved_is_what_stays_alive(name: str, stage: str, k: int, dtype: torch.dtype, way: str) -> None:
    computed = total(saved_terms(micro_of(name, batch_of(name, stage, k, dtype), stage, dtype, way)))
    assert measure(name, stage, k, dtype, way).alive == pytest.approx(computed, rel=0.002)


@every_pair
def test_height_is_what_was_alive(name: str, stage: str, k: int, dtype: torch.dtype, way: str) -> None:
    batch = batch_of(name, stage, k, dtype)
    micro = micro_of(name, batch, stage, dtype, way)
    computed = peak(micro)
    measured = measure(name, stage, k, dtype, way).height
    # But for the head's small tensors, and the gradients of the norms' weights, which wait for the first pass. With a
    # backward of its own for the last pass 0.3 % were found that nobody has explained.
    assert measured == pytest.approx(computed.total, rel=0.004 if way == "split" else 0.002)
    cut = 0
    if way == "split":
        # Leaves live as long as the last pass's graph: its inputs, and the labelled states of the passes before.
        hidden = micro.model.hidden * dtype.itemsize
        cut = hidden * (micro.passes[-1].tokens + sum(len(one.labelled) for one in batch.passes[:-1]))
    assert measure(name, stage, k, dtype, way).left <= cut + 64


def test_deepstack_features_are_there_until_the_head_is_through() -> None:
    """Pages of images, all logits in one chunk: the most is held at the head, and the features' copy with it."""
    name, chunk, vocabulary = "nano-qwen3-vl", 1 << 26, 4000
    hidden = shape(name)["text_config"]["hidden_size"]
    rows = [sample(i, 240, (), hidden * 3, torch.float32, 200, False) for i in range(3)]
    for row in rows:
        row.labels[:] = row.input_ids
    batch = collate(rows, 1, sample(-1, 4, ((1, 2),), hidden * 3, torch.float32, 0, False))
    model = whole(name, torch.float32, vocabulary)
    head = LossHead(model.lm_head.weight, chunk)
    made = MirageModel(model.model.language_model, head, None, Forward(False, "sample", "sdpa", True))
    with Live() as live:
        objective(made(batch), StepCounts(3, 720, 0), 0.1, "sample")[0].backward()
    computed = peak(micro_of(name, batch, "sft", torch.float32, "resident", vocabulary=vocabulary, chunk_bytes=chunk))
    assert computed.phase == "head"
    assert live.peak == pytest.approx(computed.total, rel=0.01)
    # Without them it would miss.
    assert live.peak - 4 * 2 * 600 * hidden < 0.99 * computed.total
