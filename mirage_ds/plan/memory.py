"""The most memory that a micro-step's activations and whole gradients take at a time, in bytes: a walk over backward.

T tokens of a pass, K visible keys, M labelled tokens, C rows of a chunk of logits, H hidden, I inner width, Hkv key
heads, D head width, V vocabulary, L layers; b bytes of an element of the compute dtype.

Autograd runs what was made last first: the head, then the passes from the last to the first, each from its last layer
to its first. What a forward saved is freed on the way, and gradients come up. Model states, gathered weights and
buckets are not here (states.py, fit.py). tests/unit/test_plan_activations.py compares the
result with the storages that are alive.
"""

from __future__ import annotations

from typing import NamedTuple

from mirage_ds.plan.activations import (
    FLOAT32,
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
        phase: "forward", "head", or the place in backward.
        activations: saved, recomputed, in work, and their gradients.
        head: chunk of logits, and the whole gradient of the output matrix while it is held.
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
    """Bytes that the loss head needs on top of what the forward saved, while its backward runs.

    torch's chunked `linear_cross_entropy` (2.13) as model/loss.py calls it. Its buffers for bf16 differ: a GPU
    multiplies bf16 into float32 logits and makes a bf16 copy of a chunk; a CPU casts the whole matrix to float32 and
    sums its gradient there. The CPU's are tested, the GPU's are read in torch/nn/modules/linear_cross_entropy.py.

    Args:
        chunk_bytes: as LossHead takes them.
        device: "cuda" or "cpu".
    """
    rows = min(max(1, chunk_bytes // (FLOAT32 * block.vocabulary)), max(1, labelled))
    matrix = block.vocabulary * block.hidden
    terms = {
        "logits chunk (4 C V)": FLOAT32 * rows * block.vocabulary,
        "gradient of the output matrix (b V H)": width * matrix,
        "gradient of the labelled states (b M H)": width * labelled * block.hidden,
    }
    if width != FLOAT32 and device == "cpu":
        terms["matrix and its gradient in float32 (2 · 4 V H)"] = 2 * FLOAT32 * matrix
        terms["gradient of the labelled states in float32 (4 M H)"] = FLOAT32 * labelled * block.hidden
        terms["states of a chunk in float32 (4 C H)"] = FLOAT32 * rows * block.hidden
    elif width != FLOAT32:
        terms["logits chunk in bf16 (b C V)"] = width * rows * block.vocabulary
        terms["states of a chunk in float32 (4 C H)"] = FLOAT32 * rows * block.hidden
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
) -> Peak:
    """Walk through forward's end, head and backward and return the height.

    Args:
        width: b.
        backend: a key of model.attention.BACKENDS.
        chunk_bytes, device: see head_terms.
        tied: the output matrix is the embedding: its gradient is complete at the very end only.
    """
    passes, hidden = micro.passes, block.hidden
    saved = total(saved_terms(block, micro, width, backend, checkpointing))
    head = head_terms(block, micro.labelled, width, chunk_bytes, device)
    matrix = width * block.vocabulary * hidden
    # At the forward's end embeddings and hidden states are there, and without checkpointing the keys and values that
    # the passes handed on (with it they are among what is saved).
    extra = 2 * width * micro.tokens * (hidden + block.head_width)
    if not checkpointing:
        extra += 2 * width * sum(one.tokens for one in passes[:-1]) * block.kv_width * block.layers
    heights = [
        Peak("forward", saved + extra, head["logits chunk (4 C V)"], 0),
        Peak("head", saved, total(head), 0),
    ]
    held = saved - width * micro.labelled * hidden - 2 * FLOAT32 * micro.labelled
    # The gradient of each pass's final states is made before the passes' turn comes.
    held += width * micro.tokens * hidden
    kept_head = matrix if tied else 0
    mlp = 3 * hidden * block.inner
    layer_weights = mlp + 2 * hidden * (hidden + block.kv_width) + 3 * hidden + 2 * block.kv_width
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
