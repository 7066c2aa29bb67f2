"""The most memory that a micro-step's activations and whole gradients take at a time, in bytes: a walk over backward.

T tokens of a pass, K visible keys, M labelled tokens, C rows of a chunk of logits, H hidden, I inner width, Hkv key
heads, D head width, V vocabulary, L layers; b bytes of an element of the compute dtype.

The head makes its gradients at the end of the forward. Autograd runs what was made last first: the head, then the
passes from the last to the first, each from its last layer to its first. What a forward saved is freed on the way, and
gradients come up. Model states, gathered weights and buckets are not here (states.py, fit.py).
tests/unit/plan/test_plan_activations.py compares the result with the storages that are alive.
"""

from __future__ import annotations

from typing import NamedTuple

from mirage_ds.plan.activations import (
    FLOAT32,
    OUTPUT_GRADIENT,
    Micro,
    PassShape,
    Terms,
    layer_terms,
    recomputed,
    saved_terms,
    total,
)
from mirage_ds.plan.shape import Block


class Peak(NamedTuple):
    """Where the most is held.

    Attributes:
        phase: "forward", "head", "head's backward", or the place in backward.
        activations: saved, recomputed, in work, and their gradients.
        head: chunk of logits and softmax, and the whole gradient of the output matrix while it is held.
        gradients: whole gradients of decoder layers that are held (stage2) or have just been made.
    """

    phase: str
    activations: int
    head: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.head + self.gradients


def head_terms(block: Block, labelled: int, width: int, chunk_bytes: int, device: str) -> Terms:
    """Bytes that the loss head has in work at the end of the forward, beside the hidden states (model/loss.py).

    A GPU multiplies bf16 into float32 logits and makes a bf16 copy of a chunk's slope. A CPU computes in float32: it
    casts the whole matrix and makes its gradient in float32.

    Args:
        chunk_bytes: as LossHead takes them.
        device: "cuda" or "cpu".
    """
    rows = min(max(1, chunk_bytes // (2 * FLOAT32 * block.vocabulary)), labelled)
    matrix = block.vocabulary * block.hidden
    terms = {
        "logits and softmax of a chunk (8 C V)": 2 * FLOAT32 * rows * block.vocabulary,
        "labelled states and their gradient (2 b M H)": 2 * width * labelled * block.hidden,
        OUTPUT_GRADIENT: width * matrix,
    }
    if width != FLOAT32 and device == "cpu":
        terms["matrix and its gradient in float32 (2 · 4 V H)"] = 2 * FLOAT32 * matrix
        terms["the labelled states' in float32 (2 · 4 M H)"] = 2 * FLOAT32 * labelled * block.hidden
    elif width != FLOAT32:
        terms["slope of a chunk in bf16 (b C V)"] = width * rows * block.vocabulary
    return terms


def layer_backward(block: Block, one: PassShape, width: int) -> int:
    """Bytes that backward of one layer has in work at its height, the MLP, beside what the layer saved.

    The gradient of the output stays for the residual (b T H). The product of gate and up is freed as its gradient is
    there, and the gradients of both factors are made from it: 2 b T I. Where T is small the gradient of a matrix of the
    MLP (b H I) beside the product's is more.
    """
    inner = width * one.tokens * block.inner
    return width * one.tokens * block.hidden + max(2 * inner, inner + width * block.hidden * block.inner)


def peak(
    block: Block,
    micro: Micro,
    width: int,
    backend: str,
    checkpointing: bool,
    chunk_bytes: int,
    device: str,
    tied: bool,
    features: int = 0,
) -> Peak:
    """Walk through forward's end, head and backward and return the height.

    Args:
        width: b.
        backend: a key of model.attention.BACKENDS.
        chunk_bytes, device: see head_terms.
        tied: the output matrix is the embedding: its gradient is complete at the very end only.
        features: of the input images; DeepStack's share of them is copied for the forward (images.place_images).
    """
    passes, hidden = micro.passes, block.hidden
    matrix, by_labelled = width * block.vocabulary * hidden, width * micro.labelled * hidden
    # The head's own gradients are made at the forward's end.
    saved = total(saved_terms(block, micro, width, backend, checkpointing)) - matrix - by_labelled
    head = head_terms(block, micro.labelled, width, chunk_bytes, device)
    # Embeddings and hidden states are there too; until the last pass has ended, so are cos and sin in the batch's order
    # and, without checkpointing, the keys and values that passes handed on (with it they are among what is saved).
    all_states = width * micro.tokens * hidden
    passing = 2 * width * micro.tokens * block.head_width
    if not checkpointing:
        passing += 2 * width * sum(one.tokens for one in passes[:-1]) * block.kv_width * block.layers
    deep = width * block.deep * (features + 1) * hidden
    heights = [
        Peak("forward", saved + 2 * all_states + passing + deep, 0, 0),
        Peak("head", saved + 2 * all_states + deep, total(head), 0),
        # The gradient of each pass's final states is made before the passes' turn comes.
        Peak("head's backward", saved + by_labelled + all_states, matrix, 0),
    ]
    held = saved + all_states
    kept_head = matrix if tied else 0
    mlp = 3 * hidden * block.inner
    beside = 2 * block.head_width if block.head_norms else block.width + 2 * block.kv_width
    layer_weights = mlp + 2 * hidden * (block.width + block.kv_width) + 2 * hidden + beside
    whole, last = 0, len(passes) - 1
    for number in range(last, -1, -1):
        one = passes[number]
        states = width * one.tokens * hidden
        held -= (FLOAT32 + width) * one.tokens * hidden + FLOAT32 * one.tokens
        own = total(layer_terms(block, one, width, backend))
        brought = recomputed(block, one, width, backend) if checkpointing else 0
        work = layer_backward(block, one, width) - states  # the gradient of the output is among `held`
        earlier = sum(before.tokens for before in passes[:number])
        for layer in range(block.layers - 1, -1, -1):
            place = f"backward of pass {number}, layer {layer}"
            heights.append(Peak(place, held + brought + work, kept_head, whole))
            if number == last > 0:
                # Once the MLP is through, its gradients stay and what it saved is gone: more where T is small.
                attention = held + brought - 4 * width * one.tokens * block.inner + 2 * states
                heights.append(Peak(place, attention, kept_head, whole + width * mlp))
            held -= states if checkpointing else own
            if number == last:
                # Gradients of earlier passes' keys and values wait for those passes, and in stage2 the weights' do.
                held += 2 * width * earlier * block.kv_width
                whole += width * layer_weights if last else 0
            if not number:
                # Only the first pass completes a weight's gradient.
                whole -= width * layer_weights if last else 0
        held -= states
    return max(heights, key=lambda height: height.total)
