"""What autograd keeps of a forward and what backward needs on top, in bytes, each term by name.

T tokens of a pass, K keys that they see (of all passes up to it, sample by sample), N samples that take part, M
labelled tokens of the micro-batch, R rows of it, Λ grounded latents (stage1), H hidden, I inner width, Hq and Hkv
heads, D head width (Hq D is H but in Qwen3-VL), V vocabulary, L layers; b bytes of an element of the compute dtype (2
in bf16, 4 in fp32).

Counted: unique storages that a backward still needs once the forward has returned. Not counted: parameters and buffers,
and the Batch itself (ids, indices, features), which are there anyway. The layers are transformers' own (5.23), the walk
is model/latents.py, the head is model/loss.py. tests/unit/plan/test_plan_activations.py compares every number here,
for each family, with what saved-tensor hooks and live storages count; it can run SDPA alone, so what the other two
back ends keep is read in their code, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mirage_ds.plan.shape import Block

FLOAT32 = 4
# Name of the term: made by the head at the end of the forward, used by its backward.
OUTPUT_GRADIENT = "gradient of the output matrix (b V H)"
INT64 = 8
Terms = dict[str, int]


class PassShape(NamedTuple):
    """One pass over the layers.

    Attributes:
        queries, keys: tokens and visible keys of each sample that takes part, (N,) each.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.queries)

    @property
    def visible(self) -> int:
        """K."""
        return sum(self.keys)


class Micro(NamedTuple):
    """One rank's micro-batch.

    Attributes:
        passes: the schedule.
        labelled: M; rows: R.
        grounded: Λ, latents with a target; None outside stage1.
    """

    passes: tuple[PassShape, ...]
    labelled: int
    rows: int
    grounded: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all passes."""
        return sum(one.tokens for one in self.passes)


def layer_terms(block: Block, one: PassShape, width: int, backend: str) -> Terms:
    """Bytes that one decoder layer keeps of one pass without checkpointing.

    Args:
        width: b.
        backend: a key of model.attention.BACKENDS.
    """
    tokens, hidden, inner = one.tokens, block.hidden, block.inner
    terms = {
        # RMSNorm squares and scales in float32; in fp32 these are the layer's input and the sum after attention.
        "inputs of the norms (2 · 4 T H)": 2 * FLOAT32 * tokens * hidden,
        "1 / RMS (2 · 4 T)": 2 * FLOAT32 * tokens,
        "normalised, before the norms' weights (2 b T H)": 2 * width * tokens * hidden,
        "inputs of q, k, v and of gate, up (2 b T H)": 2 * width * tokens * hidden,
        "queries (b T Hq D)": width * tokens * block.width,
        "keys and values (2 b K Hkv D)": 2 * width * one.visible * block.kv_width,
        "attention's output (b T Hq D)": width * tokens * block.width,
        "log-sum-exp (4 T Hq)": FLOAT32 * tokens * block.heads,
        "gate, its activation, up, their product (4 b T I)": 4 * width * tokens * inner,
    }
    if block.head_norms:
        # As the layer's own norms: squared and scaled in float32.
        heads = tokens * (block.heads + block.kv_heads)
        terms["heads' norms (((4 + b) D + 4) T (Hq + Hkv))"] = ((FLOAT32 + width) * block.head_width + FLOAT32) * heads
    if backend == "sdpa":
        # SDPA runs once for each pair of lengths: outputs are joined to a copy, and a mask becomes numbers.
        masks = {(q, k) for q, k in zip(one.queries, one.keys, strict=True) if q not in (1, k)}
        terms["sdpa: outputs joined (b T Hq D)"] = width * tokens * block.width
        terms["sdpa: masks (b T K of each pair of lengths)"] = width * sum(q * k for q, k in masks)
    return terms


def _outside_layers(block: Block, micro: Micro, width: int) -> Terms:
    tokens, hidden = micro.tokens, block.hidden
    fed_back = sum(len(one.queries) for one in micro.passes[1:])
    terms = {
        "final norm ((4 + b) T H + 4 T)": (FLOAT32 + width) * tokens * hidden + FLOAT32 * tokens,
        "rotary cos and sin (2 b T D)": 2 * width * tokens * block.head_width,
        "states fed back (b N H a pass)": width * fed_back * hidden,
        "gradient of the labelled states (b M H)": width * micro.labelled * hidden,
        OUTPUT_GRADIENT: width * block.vocabulary * hidden,
    }
    if micro.grounded is not None:
        # before and target in float32, the index, two norms and the weight of each.
        each = 2 * FLOAT32 * hidden + INT64 + 3 * FLOAT32
        terms["grounding (Λ (8 H + 20) + 8 R)"] = micro.grounded * each + INT64 * micro.rows
    return terms


def saved_terms(block: Block, micro: Micro, width: int, backend: str, checkpointing: bool) -> Terms:
    """Bytes that are kept from the end of the forward until backward has used them.

    With checkpointing each layer call keeps its input, and the keys and values of earlier passes are kept once a layer
    as arguments of the later calls. Without it each pass keeps a copy of all earlier keys and values instead.
    """
    terms = _outside_layers(block, micro, width)
    if checkpointing:
        earlier = sum(one.tokens for one in micro.passes[:-1])
        terms["inputs of the layers (b T H L)"] = width * micro.tokens * block.hidden * block.layers
        terms["keys and values of earlier passes (2 b T Hkv D L)"] = 2 * width * earlier * block.kv_width * block.layers
        return terms
    for one in micro.passes:
        for name, size in layer_terms(block, one, width, backend).items():
            terms[name] = terms.get(name, 0) + block.layers * size
    return terms


def recomputed(block: Block, one: PassShape, width: int, backend: str) -> int:
    """Bytes that recomputing one layer of a pass brings back: what it keeps, but for the input, which is there."""
    there = FLOAT32 * one.tokens * block.hidden if width == FLOAT32 else 0
    return sum(layer_terms(block, one, width, backend).values()) - there


def total(terms: Mapping[str, int]) -> int:
    """Sum of the terms."""
    return sum(terms.values())
