"""What autograd keeps of a forward, what backward needs on top, and the height of both: in bytes, each term by name.

T tokens of a pass, K keys that they see (of all passes up to it, sample by sample), N samples that take part, M
labelled tokens of the micro-batch, C of them in a chunk of logits, S words of a slice of V, R rows of the micro-batch,
Λ grounded latents (stage1), H hidden, I inner width, Hq and Hkv heads, D head width (Hq D is H but in Qwen3-VL), V
vocabulary, L layers; b bytes of an element of the compute dtype (2 in bf16, 4 in fp32).

Counted: unique storages that a backward still needs once the forward has returned. Not counted: parameters and buffers,
and the Batch itself (ids, indices, features), which are there anyway. The layers are transformers' own (5.23), the walk
is model/latents.py with model/layers.py and model/attention.py, the head is model/loss.py.
tests/unit/plan/test_plan_activations.py compares every number here, for each family, with what saved-tensor hooks and
live storages count; it can run SDPA alone, so what the other two back ends keep is read in their code, not measured.

`peak` walks over backward. The head makes its gradients at the end of the forward. Autograd runs what was made last
first: the head, then the passes from the last to the first, each from its last layer to its first. What a forward saved
is freed on the way, and gradients come up; what later passes leave to the first one's weight gradients stays until it
comes. Model states, gathered weights and buckets are not here (states.py, fit.py).
"""

from typing import NamedTuple

from mirage_ds.model.chunks import CPU_BYTES, FLOAT32, divide
from mirage_ds.plan.shape import Sizes

# Name of the term: made by the head at the end of the forward, used by its backward.
OUTPUT_GRADIENT = "gradient of the output matrix (b V H)"
GROUNDING = "grounding (Λ (8 H + 20) + 8 R)"
INT64 = 8
Terms = dict[str, int]


class PassShape(NamedTuple):
    """One pass over the layers.

    Attributes:
        queries, keys: tokens and visible keys of each part (data.passes.PassPlan), (N,) each.
        fed: tokens whose input is fed back; N of each pass but the first if None.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    fed: int | None = None

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
        resident: the layers' weights are whole all the time (DecoderLayers.resident).
        split: the last pass has an engine backward of its own; else it leaves its weight gradients to the first pass.
        handed_on: labelled tokens of the passes before the last.
        encoder: elements that are trained in place of the model's weights, which are frozen (scaffold); 0 elsewhere.
    """

    model: Sizes
    passes: tuple[PassShape, ...]
    labelled: int
    rows: int
    grounded: int | None = None
    width: int = 2
    backend: str = "flash"
    checkpointing: bool = True
    chunk_bytes: int = CPU_BYTES
    device: str = "cuda"
    features: int = 0
    resident: bool = True
    split: bool = False
    handed_on: int = 0
    encoder: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all passes."""
        return sum(one.tokens for one in self.passes)

    @property
    def last(self) -> int:
        """Number of the last pass."""
        return len(self.passes) - 1

    @property
    def backwards(self) -> int:
        """Engine backwards of a micro-step."""
        return 1 + (self.split and self.last > 0)

    def fed(self, number: int) -> int:
        """States that a pass is fed of the one before."""
        one = self.passes[number]
        return len(one.queries) if one.fed is None else one.fed

    def thin(self, number: int) -> bool:
        """Whether a pass recomputes its attention alone: at most a token a sample, and weights that stay."""
        return number > 0 and max(self.passes[number].queries) <= 1 and self.resident

    def recomputed(self, number: int) -> bool:
        """Whether a pass keeps its layers' inputs alone."""
        return self.checkpointing and not self.thin(number)

    def keeps_keys(self, number: int) -> bool:
        """Whether a pass's own keys and values stay for backward: a thin one's, and those that a later call takes."""
        after = range(number + 1, len(self.passes))
        return self.thin(number) or any(self.thin(later) or self.recomputed(later) for later in after)


def layer_terms(micro: Micro, number: int) -> Terms:
    """Bytes that one decoder layer keeps of one pass without checkpointing."""
    model, width, one = micro.model, micro.width, micro.passes[number]
    tokens, hidden, inner = one.tokens, model.hidden, model.inner
    terms = {
        # RMSNorm squares and scales in float32; in fp32 these are the layer's input and the sum after attention.
        "inputs of the norms (2 · 4 T H)": 2 * FLOAT32 * tokens * hidden,
        "1 / RMS (2 · 4 T)": 2 * FLOAT32 * tokens,
        "normalised, before the norms' weights (2 b T H)": 2 * width * tokens * hidden,
        "inputs of q, k, v and of gate, up (2 b T H)": 2 * width * tokens * hidden,
        "queries (b T Hq D)": width * tokens * model.width,
        "attention's output (b T Hq D)": width * tokens * model.width,
        "gate, its activation, up, their product (4 b T I)": 4 * width * tokens * inner,
    }
    if model.head_norms:
        # As the layer's own norms: squared and scaled in float32.
        heads = tokens * (model.heads + model.kv_heads)
        terms["heads' norms (((4 + b) D + 4) T (Hq + Hkv))"] = ((FLOAT32 + width) * model.head_width + FLOAT32) * heads
    if micro.thin(number):
        return terms
    terms["keys and values, joined (2 b K Hkv D)"] = 2 * width * sum(one.keys) * model.kv_width
    terms["log-sum-exp (4 T Hq)"] = FLOAT32 * tokens * model.heads
    if micro.backend == "sdpa":
        # SDPA runs once for each pair of lengths: outputs are joined to a copy, and a mask becomes numbers.
        masks = {(q, k) for q, k in zip(one.queries, one.keys, strict=True) if q not in (1, k)}
        terms["sdpa: outputs joined (b T Hq D)"] = width * tokens * model.width
        terms["sdpa: masks (b T K of each pair of lengths)"] = width * sum(q * k for q, k in masks)
    return terms


def own_keys(micro: Micro, number: int) -> int:
    """Bytes of one layer's keys and values that a pass makes."""
    return 2 * micro.width * micro.passes[number].tokens * micro.model.kv_width


def saved_terms(micro: Micro) -> Terms:
    """Bytes that are kept from the end of the forward until backward has used them.

    With checkpointing each layer call keeps its input, and the keys and values of earlier passes are kept once a layer
    as arguments of the later calls. Thin passes of resident weights are not checkpointed: but for attention, which
    joins the keys once more in backward, they keep what autograd saves. Without checkpointing each other pass keeps a
    joined copy of all earlier keys and values.
    """
    model, width, tokens, hidden = micro.model, micro.width, micro.tokens, micro.model.hidden
    fed_back = sum(micro.fed(number) for number in range(1, len(micro.passes)))
    terms = {
        "final norm ((4 + b) T H + 4 T)": (FLOAT32 + width) * tokens * hidden + FLOAT32 * tokens,
        "rotary cos and sin (2 b T D)": 2 * width * tokens * model.head_width,
        "states fed back (b N H a pass)": width * fed_back * hidden,
        "gradient of the labelled states (b M H)": width * micro.labelled * hidden,
        OUTPUT_GRADIENT: 0 if micro.encoder else width * model.vocabulary * hidden,
    }
    if micro.grounded is not None:
        # before and target in float32, the index, two norms and the weight of each.
        each = 2 * FLOAT32 * hidden + INT64 + 3 * FLOAT32
        terms[GROUNDING] = micro.grounded * each + INT64 * micro.rows
    if micro.backwards > 1:
        terms["labelled states of earlier passes (b M H)"] = width * micro.handed_on * hidden
    inputs, keys = "inputs of the layers (b T H L)", "keys and values of passes (2 b T Hkv D L)"
    for number, one in enumerate(micro.passes):
        kept = {inputs: width * one.tokens * hidden} if micro.recomputed(number) else layer_terms(micro, number)
        if micro.keeps_keys(number):
            kept = {**kept, keys: own_keys(micro, number)}
        for name, size in kept.items():
            terms[name] = terms.get(name, 0) + model.layers * size
    return terms


def brought_back(micro: Micro, number: int) -> int:
    """Bytes that recomputing one layer of a pass brings back: what it keeps, but for the input, which is there."""
    there = FLOAT32 * micro.passes[number].tokens * micro.model.hidden if micro.width == FLOAT32 else 0
    return total(layer_terms(micro, number)) - there


def total(terms: Terms) -> int:
    """Sum of the terms."""
    return sum(terms.values())


class Peak(NamedTuple):
    """Where the most is held.

    Attributes:
        phase: "forward", "head", "head's backward", or the place in backward.
        activations: saved, recomputed, in work, and their gradients.
        head: chunk of logits and softmax, and the whole gradient of the output matrix while it is held.
        deferred: what later passes have left to the weight gradients of the first.
    """

    phase: str
    activations: int
    head: int
    deferred: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.head + self.deferred


def head_terms(micro: Micro) -> Terms:
    """Bytes that the loss head has in work at the end of the forward, beside the hidden states (model/loss.py).

    A GPU multiplies bf16 into float32 logits and makes a bf16 copy of a chunk's slope. A CPU computes in float32 and
    casts the whole matrix. The gradient of a bf16 matrix is made after the chunks, in slices.
    """
    model, width, labelled, on_gpu = micro.model, micro.width, micro.labelled, micro.device == "cuda"
    rows, words = divide(labelled, model.hidden, model.vocabulary, micro.chunk_bytes, on_gpu)
    chunk = {"logits and softmax of a chunk (8 C V)": 2 * FLOAT32 * rows * model.vocabulary}
    terms = {
        "labelled states and their gradient (2 b M H)": 2 * width * labelled * model.hidden,
        OUTPUT_GRADIENT: 0 if micro.encoder else width * model.vocabulary * model.hidden,
    }
    if width == FLOAT32:
        return terms | chunk
    product, copied = (width, width) if on_gpu else (FLOAT32, 0)
    if not on_gpu:
        terms["matrix in float32 (4 V H)"] = FLOAT32 * model.vocabulary * model.hidden
        # The gradient in bf16 comes last.
        terms["the labelled states' in float32 ((8 − b) M H)"] = (2 * FLOAT32 - width) * labelled * model.hidden
    chunk["slope of a chunk in bf16 (b C V)"] = copied * rows * model.vocabulary
    a_slice = words * ((FLOAT32 + copied) * labelled + product * model.hidden)
    return terms | max(chunk, {"a slice of the vocabulary (S ((4 + b) M + b H))": a_slice}, key=total)


def splits(model: Sizes, tokens: int) -> bool:
    """Whether a run gives stage2's last pass a backward of its own: DecoderLayers.defers_more_than_gradients.

    Args:
        tokens: --micro_batch_tokens, the most that the pass may have.
    """
    each = 7 * model.hidden + 2 * model.width + 2 * model.kv_width + 3 * model.inner
    return tokens * each > model.layer


def deposited(micro: Micro, number: int) -> int:
    """Bytes that one layer of a pass leaves to the first pass's weight gradients: b T (4 H + 2 Hq D + 2 Hkv D + 3 I).

    Inputs of q, k, v together, of o, of gate and up together, of down; gradients of the outputs of all seven.
    """
    model = micro.model
    if not number or (micro.split and number == micro.last):
        return 0
    each = 4 * model.hidden + 2 * model.width + 2 * model.kv_width + 3 * model.inner
    return micro.width * micro.passes[number].tokens * each


def layer_backward(micro: Micro, number: int) -> int:
    """Bytes that backward of one layer has in work at its height, the MLP, beside what the layer saved.

    The gradient of the output stays for the residual (b T H). The product of gate and up is freed as its gradient is
    there, unless it is left to the first pass, and the gradients of both factors are made from it: 2 b T I. Where T is
    small the gradient of a matrix of the MLP (b H I) beside the product's is more; the first pass adds to it what was
    left, joined to one tensor.
    """
    model, width, tokens = micro.model, micro.width, micro.passes[number].tokens
    inner = width * tokens * model.inner
    if deposited(micro, number):
        return width * tokens * model.hidden + 3 * inner
    left = 0 if number else sum(one.tokens for later, one in enumerate(micro.passes) if deposited(micro, later))
    matrix = width * (model.hidden * model.inner + left * (model.hidden + model.inner))
    return width * tokens * model.hidden + max(2 * inner, inner + matrix)


def peak(micro: Micro) -> Peak:
    """Walk through forward's end, head and backward and return the height."""
    model, passes, width, last = micro.model, micro.passes, micro.width, micro.last
    hidden, split = model.hidden, micro.backwards > 1
    matrix, by_labelled = width * model.vocabulary * hidden, width * micro.labelled * hidden
    # The head's own gradients are made at the forward's end. What measures stage1's distance comes after it and is gone
    # before the passes' turn.
    terms = saved_terms(micro)
    saved = total(terms) - matrix - by_labelled - terms.get(GROUNDING, 0)
    # Embeddings and hidden states are there too; until the last pass has ended, so are cos and sin in the batch's
    # order, and the keys and values that passes handed on and nothing saves.
    all_states = width * micro.tokens * hidden
    passing = 2 * width * micro.tokens * model.head_width
    passing += model.layers * sum(own_keys(micro, number) for number in range(last) if not micro.keeps_keys(number))
    # DeepStack's features, and stage1's targets.
    deep = width * (model.deep * (micro.features + 1) + (micro.grounded or 0)) * hidden
    # The gradients of all passes' final states are made before the passes' turn comes; with a backward of its own the
    # last pass's are, and those of the labelled states wait.
    own_states = width * passes[last].tokens * hidden
    held = saved + (own_states + by_labelled if split else all_states)
    heights = [
        Peak("forward", saved + 2 * all_states + passing + deep, 0, 0),
        Peak("head", saved + 2 * all_states + deep, total(head_terms(micro)), 0),
        Peak("head's backward", held + (0 if split else by_labelled), matrix, 0),
    ]
    # The gradient of a matrix that is also the embedding is complete at the very end of a backward only.
    kept_head = 0 if model.head or split else matrix
    deferred = 0
    for number in range(last, -1, -1):
        states = width * passes[number].tokens * hidden
        held -= (FLOAT32 + width) * passes[number].tokens * hidden + FLOAT32 * passes[number].tokens
        recomputed, left = micro.recomputed(number), deposited(micro, number)
        brought = brought_back(micro, number) if recomputed else 0
        gone = states if recomputed else total(layer_terms(micro, number))
        # The first call that took a pass's keys is the last to free them; a thin pass takes its own.
        gone += own_keys(micro, number) if micro.thin(number) else 0
        if number and micro.keeps_keys(number - 1) and not micro.thin(number - 1):
            gone += own_keys(micro, number - 1)
        # Of all passes' keys and values: one tensor a layer, made by the last pass and there until backward ends.
        made = 2 * width * micro.tokens * model.kv_width if number == last > 0 else 0
        # The gradient of the output is among `held`.
        work = brought + layer_backward(micro, number) - states
        for layer in range(model.layers - 1, -1, -1):
            heights.append(Peak(f"backward of pass {number}, layer {layer}", held + work, kept_head, deferred))
            held += made - gone
            deferred += left
            if not number:
                deferred -= sum(deposited(micro, later) for later in range(1, len(passes)))
        held -= states + 2 * width * passes[number].tokens * model.head_width
        if number:
            held -= width * micro.fed(number) * hidden  # the states fed back
        if number == last:
            # Gradients of the embeddings of all tokens. The other backward begins with those of the other final states,
            # and the labelled states' have gone into them.
            held += all_states + (all_states - by_labelled if split else 0)
    return max(heights, key=lambda height: height.total)
