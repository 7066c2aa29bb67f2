"""What autograd keeps of a forward, what backward needs on top, and the height of both: in bytes, each term by name.

T tokens of a pass, K keys that they see (of all passes up to it, sample by sample), N samples that take part, M
labelled tokens of the micro-batch, C of them in a chunk of logits, R rows of it, Λ grounded latents (stage1), H hidden,
I inner width, Hq and Hkv heads, D head width (Hq D is H but in Qwen3-VL), V vocabulary, L layers; b bytes of an element
of the compute dtype (2 in bf16, 4 in fp32).

Counted: unique storages that a backward still needs once the forward has returned. Not counted: parameters and buffers,
and the Batch itself (ids, indices, features), which are there anyway. The layers are transformers' own (5.23), the walk
is model/latents.py, the head is model/loss.py. tests/unit/plan/test_plan_activations.py compares every number here,
for each family, with what saved-tensor hooks and live storages count; it can run SDPA alone, so what the other two
back ends keep is read in their code, not measured.

`peak` walks over backward. The head makes its gradients at the end of the forward. Autograd runs what was made last
first: the head, then the passes from the last to the first, each from its last layer to its first. What a forward saved
is freed on the way, and gradients come up. Model states, gathered weights and buckets are not here (states.py, fit.py).
"""

from typing import NamedTuple

from mirage_ds.plan.shape import Sizes

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


class Micro(NamedTuple):
    """One rank's micro-batch, and how it is run.

    Attributes:
        model: its sizes.
        passes: the schedule.
        labelled: M; rows: R.
        grounded: Λ, latents with a target; None outside stage1.
        width: b.
        backend: a key of model.attention.BACKENDS.
        checkpointing: layers are recomputed in backward.
        chunk_bytes: as LossHead takes them.
        device: "cuda" or "cpu".
        features: of the input images; DeepStack's share of them is copied for the forward (images.place_images).
    """

    model: Sizes
    passes: tuple[PassShape, ...]
    labelled: int
    rows: int
    grounded: int | None = None
    width: int = 2
    backend: str = "flash"
    checkpointing: bool = True
    chunk_bytes: int = 256 << 20
    device: str = "cuda"
    features: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all passes."""
        return sum(one.tokens for one in self.passes)


def layer_terms(micro: Micro, one: PassShape) -> Terms:
    """Bytes that one decoder layer keeps of one pass without checkpointing."""
    model, width, tokens = micro.model, micro.width, one.tokens
    hidden, inner = model.hidden, model.inner
    terms = {
        # RMSNorm squares and scales in float32; in fp32 these are the layer's input and the sum after attention.
        "inputs of the norms (2 · 4 T H)": 2 * FLOAT32 * tokens * hidden,
        "1 / RMS (2 · 4 T)": 2 * FLOAT32 * tokens,
        "normalised, before the norms' weights (2 b T H)": 2 * width * tokens * hidden,
        "inputs of q, k, v and of gate, up (2 b T H)": 2 * width * tokens * hidden,
        "queries (b T Hq D)": width * tokens * model.width,
        "keys and values (2 b K Hkv D)": 2 * width * sum(one.keys) * model.kv_width,
        "attention's output (b T Hq D)": width * tokens * model.width,
        "log-sum-exp (4 T Hq)": FLOAT32 * tokens * model.heads,
        "gate, its activation, up, their product (4 b T I)": 4 * width * tokens * inner,
    }
    if model.head_norms:
        # As the layer's own norms: squared and scaled in float32.
        heads = tokens * (model.heads + model.kv_heads)
        terms["heads' norms (((4 + b) D + 4) T (Hq + Hkv))"] = ((FLOAT32 + width) * model.head_width + FLOAT32) * heads
    if micro.backend == "sdpa":
        # SDPA runs once for each pair of lengths: outputs are joined to a copy, and a mask becomes numbers.
        masks = {(q, k) for q, k in zip(one.queries, one.keys, strict=True) if q not in (1, k)}
        terms["sdpa: outputs joined (b T Hq D)"] = width * tokens * model.width
        terms["sdpa: masks (b T K of each pair of lengths)"] = width * sum(q * k for q, k in masks)
    return terms


def saved_terms(micro: Micro) -> Terms:
    """Bytes that are kept from the end of the forward until backward has used them.

    With checkpointing each layer call keeps its input, and the keys and values of earlier passes are kept once a layer
    as arguments of the later calls. Without it each pass keeps a copy of all earlier keys and values instead.
    """
    model, width, tokens, hidden = micro.model, micro.width, micro.tokens, micro.model.hidden
    fed_back = sum(len(one.queries) for one in micro.passes[1:])
    terms = {
        "final norm ((4 + b) T H + 4 T)": (FLOAT32 + width) * tokens * hidden + FLOAT32 * tokens,
        "rotary cos and sin (2 b T D)": 2 * width * tokens * model.head_width,
        "states fed back (b N H a pass)": width * fed_back * hidden,
        "gradient of the labelled states (b M H)": width * micro.labelled * hidden,
        OUTPUT_GRADIENT: width * model.vocabulary * hidden,
    }
    if micro.grounded is not None:
        # before and target in float32, the index, two norms and the weight of each.
        each = 2 * FLOAT32 * hidden + INT64 + 3 * FLOAT32
        terms["grounding (Λ (8 H + 20) + 8 R)"] = micro.grounded * each + INT64 * micro.rows
    if micro.checkpointing:
        earlier = sum(one.tokens for one in micro.passes[:-1])
        terms["inputs of the layers (b T H L)"] = width * tokens * hidden * model.layers
        terms["keys and values of earlier passes (2 b T Hkv D L)"] = 2 * width * earlier * model.kv_width * model.layers
        return terms
    for one in micro.passes:
        for name, size in layer_terms(micro, one).items():
            terms[name] = terms.get(name, 0) + model.layers * size
    return terms


def recomputed(micro: Micro, one: PassShape) -> int:
    """Bytes that recomputing one layer of a pass brings back: what it keeps, but for the input, which is there."""
    there = FLOAT32 * one.tokens * micro.model.hidden if micro.width == FLOAT32 else 0
    return total(layer_terms(micro, one)) - there


def total(terms: Terms) -> int:
    """Sum of the terms."""
    return sum(terms.values())


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


def head_terms(micro: Micro) -> Terms:
    """Bytes that the loss head has in work at the end of the forward, beside the hidden states (model/loss.py).

    A GPU multiplies bf16 into float32 logits and makes a bf16 copy of a chunk's slope. A CPU computes in float32: it
    casts the whole matrix and makes its gradient in float32.
    """
    model, width, labelled = micro.model, micro.width, micro.labelled
    rows = min(max(1, micro.chunk_bytes // (2 * FLOAT32 * model.vocabulary)), labelled)
    matrix = model.vocabulary * model.hidden
    terms = {
        "logits and softmax of a chunk (8 C V)": 2 * FLOAT32 * rows * model.vocabulary,
        "labelled states and their gradient (2 b M H)": 2 * width * labelled * model.hidden,
        OUTPUT_GRADIENT: width * matrix,
    }
    if width != FLOAT32 and micro.device == "cpu":
        terms["matrix and its gradient in float32 (2 · 4 V H)"] = 2 * FLOAT32 * matrix
        terms["the labelled states' in float32 (2 · 4 M H)"] = 2 * FLOAT32 * labelled * model.hidden
    elif width != FLOAT32:
        terms["slope of a chunk in bf16 (b C V)"] = width * rows * model.vocabulary
    return terms


def layer_backward(micro: Micro, one: PassShape) -> int:
    """Bytes that backward of one layer has in work at its height, the MLP, beside what the layer saved.

    The gradient of the output stays for the residual (b T H). The product of gate and up is freed as its gradient is
    there, and the gradients of both factors are made from it: 2 b T I. Where T is small the gradient of a matrix of the
    MLP (b H I) beside the product's is more.
    """
    model, width = micro.model, micro.width
    inner = width * one.tokens * model.inner
    return width * one.tokens * model.hidden + max(2 * inner, inner + width * model.hidden * model.inner)


def peak(micro: Micro) -> Peak:
    """Walk through forward's end, head and backward and return the height."""
    model, passes, width, checkpointing = micro.model, micro.passes, micro.width, micro.checkpointing
    hidden = model.hidden
    matrix, by_labelled = width * model.vocabulary * hidden, width * micro.labelled * hidden
    # The head's own gradients are made at the forward's end.
    saved = total(saved_terms(micro)) - matrix - by_labelled
    head = total(head_terms(micro))
    # Embeddings and hidden states are there too; until the last pass has ended, so are cos and sin in the batch's order
    # and, without checkpointing, the keys and values that passes handed on (with it they are among what is saved).
    all_states = width * micro.tokens * hidden
    passing = 2 * width * micro.tokens * model.head_width
    if not checkpointing:
        passing += 2 * width * sum(one.tokens for one in passes[:-1]) * model.kv_width * model.layers
    deep = width * model.deep * (micro.features + 1) * hidden
    heights = [
        Peak("forward", saved + 2 * all_states + passing + deep, 0, 0),
        Peak("head", saved + 2 * all_states + deep, head, 0),
        # The gradient of each pass's final states is made before the passes' turn comes.
        Peak("head's backward", saved + by_labelled + all_states, matrix, 0),
    ]
    held = saved + all_states
    # The gradient of a matrix that is also the embedding is complete at the very end only.
    kept_head = 0 if model.head else matrix
    whole, last = 0, len(passes) - 1
    # Of a layer's weights; with a single pass they go as they come.
    gradients = width * (model.layer + model.vectors) if last else 0
    for number in range(last, -1, -1):
        one = passes[number]
        states = width * one.tokens * hidden
        held -= (FLOAT32 + width) * one.tokens * hidden + FLOAT32 * one.tokens
        own = total(layer_terms(micro, one))
        brought = recomputed(micro, one) if checkpointing else 0
        work = layer_backward(micro, one) - states  # the gradient of the output is among `held`
        earlier = sum(before.tokens for before in passes[:number])
        for layer in range(model.layers - 1, -1, -1):
            place = f"backward of pass {number}, layer {layer}"
            heights.append(Peak(place, held + brought + work, kept_head, whole))
            if number == last > 0:
                # Once the MLP is through, its gradients stay and what it saved is gone: more where T is small.
                attention = held + brought - 4 * width * one.tokens * model.inner + 2 * states
                heights.append(Peak(place, attention, kept_head, whole + 3 * width * hidden * model.inner))
            held -= states if checkpointing else own
            if number == last:
                # Gradients of earlier passes' keys and values wait for those passes, and in stage2 the weights' do.
                held += 2 * width * earlier * model.kv_width
                whole += gradients
            if not number:
                # Only the first pass completes a weight's gradient.
                whole -= gradients
        held -= states
    return max(heights, key=lambda height: height.total)
