"""A row through the model, and all numbers and figures of its latent blocks: also for a run that is training.

T tokens of a row, n latents of a row, k latents a block, Q queries or tokens of the answer behind a block, F merged
features of an image (rows × columns of them), m words, H hidden, L layers, V vocabulary, D head width, Hq query heads,
Hkv key heads.

A latent is what is fed back at its place: the final-norm hidden state of the position before it. Where a block's are
made together (--latent_passes), that state in the last pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect import measure
from mirage_ds.data.encode import IMAGE_PAD, Encoder
from mirage_ds.data.passes import schedule
from mirage_ds.data.record import Record
from mirage_ds.data.sample import Sample
from mirage_ds.model.attention import Ends, Packed
from mirage_ds.model.choose import check_finite
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import generate
from mirage_ds.model.images import Deep, embedded, place_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a token of the answer can look at, in the order of Look.shares.
PARTS = ("images", "text before", "latents", "text behind")
# m.
WORDS = 6


class Thought:
    """One row as the model ran it.

    Attributes:
        ids: (T,) tokens; inputs: (T, H) what was fed at each place; position_ids: (3, T).
        runs: the latent blocks as (first latent's place, latents).
        latents: one (k, H) tensor a block.
        images: (F, H) merged features of the row's input images, as they are fed.
        deep: what they add behind the first layers, in families that have that.
        hidden: (h,) places that text behind the first block does not see (Sample.hidden), perhaps none.
    """

    def __init__(self, sample: Sample, inputs: torch.Tensor, latents: tuple[torch.Tensor, ...], seen: torch.Tensor):
        """Put it together; `seen` are the features (F, (1 + D) · H) of the images: what is fed and what is added."""
        self.ids, self.position_ids, self.runs = sample.input_ids, sample.position_ids, sample.runs
        self.inputs, self.latents = inputs, latents
        self.hidden = torch.empty(0, dtype=torch.long) if sample.hidden is None else sample.hidden
        self.images = embedded(seen, inputs.shape[1])
        self.deep: Deep | None = place_images(inputs, seen, sample.image_positions.to(inputs.device))[1]

    @property
    def places(self) -> torch.Tensor:
        """(n,) places of all latents."""
        return torch.tensor([start + i for start, k in self.runs for i in range(k)], dtype=torch.long)

    def answer(self, block: int) -> torch.Tensor:
        """(Q,) places of the tokens behind a latent block and its end token that are no latents."""
        first, k = self.runs[block]
        places = torch.arange(first + k + 1, len(self.ids))
        return places[~torch.isin(places, self.places)]


class _Recording:
    """Attention over one row that also keeps the probabilities of chosen queries: a layer's Context.

    Args:
        queries: (Q,) places of text behind a latent block; hidden: (h,) places that it does not see.
        packed: the row as one pass.
    """

    def __init__(self, queries: torch.Tensor, hidden: torch.Tensor, packed: Packed):
        self.queries, self.hidden, self.packed = queries, hidden, packed
        self.mean = torch.empty(0)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend with q (T, Hq, D) to k, v (T, Hkv, D) → (T, Hq, D)."""
        length = len(q)
        # (Q, Hkv, Hq / Hkv, D): neighbouring query heads share a key head.
        chosen = q.index_select(0, self.queries).float().unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("qgrd,tgd->grqt", chosen, k.float()) * scale
        unseen = (torch.arange(length, device=q.device) > self.queries[:, None]).index_fill(1, self.hidden, True)
        self.mean = scores.masked_fill(unseen, float("-inf")).softmax(-1).mean((0, 1))
        return self.packed.attend(q, k, v, scale)


@torch.no_grad()
def attention(model: MirageModel, thought: Thought, queries: torch.Tensor) -> torch.Tensor:
    """Run a row once more, in one pass: all its inputs are known now, the fed-back latents too.

    Args:
        queries: (Q,) places.

    Returns:
        (L, Q, T) attention probabilities of the queries, the mean over heads; float32, on the CPU.
    """
    text, device = model.language_model, thought.inputs.device
    x = thought.inputs[None]
    rotary = text.rotary_emb(x, thought.position_ids.to(device)[:, None])
    found = []
    plan = schedule([len(thought.ids)], [thought.runs], 1, hidden=[thought.hidden.numpy()])[0]
    keys, q, k = (torch.tensor(one, device=device) for one in (plan.keys, plan.query_lengths, plan.key_lengths))
    cu_q, cu_k = (functional.pad(one.cumsum(0, dtype=torch.int32), (1, 0)) for one in (q, k))
    ends = Ends(cu_q, cu_k, max(plan.query_lengths), max(plan.key_lengths))
    every = torch.arange(len(thought.inputs), device=device)
    for number, layer in enumerate(text.layers):
        recording = _Recording(queries.to(device), thought.hidden.to(device), Packed([], [], keys, ends, "sdpa"))
        x = layer(x, position_embeddings=rotary, packed=recording)
        if thought.deep is not None:
            x = thought.deep.add(number, x[0], every)[None]
        found.append(recording.mean)
    return torch.stack(found).cpu()


@torch.no_grad()
def taught(bench: Bench, samples: Sequence[Sample]) -> list[Thought]:
    """Run encoded rows with their answers given and their latents fed back, as stage 2 does, whatever the stage.

    Args:
        samples: rows of a stage2 encoder.

    Returns:
        One Thought a row.

    Raises:
        NotFinite: a row's logits are not.
    """
    batch, inputs, states = bench.fed_back(samples)
    assert batch.image_features is not None
    # What is not finite reaches a row's last token: it attends to all others.
    last = states[batch.cu_seqlens[1:].long() - 1]
    check_finite(functional.linear(last, bench.model.head.weight), batch.rows)
    latents = bench.model.feed(states.index_select(0, batch.latents - 1))
    images = batch.image_features.split([len(sample.image_positions) for sample in samples])
    each = iter(latents.split([k for sample in samples for _, k in sample.runs]))
    return [
        Thought(sample, fed, tuple(islice(each, len(sample.runs))), seen)
        for sample, fed, seen in zip(
            samples, inputs.split([len(one.input_ids) for one in samples]), images, strict=True
        )
    ]


def decoded(bench: Bench, prompt: Sample) -> Thought:
    """Let the model answer a prompt greedily, within bench.limits, and run its answer as if it were given.

    Args:
        prompt: see Encoder.encode_prompt.

    Returns:
        The row without the last token, which was never fed; `runs` is empty where the model opened none.
    """
    answer = generate(bench.model, bench.prompts([prompt]), bench.tokens, bench.limits)[0]
    return taught(bench, [prompt.answered(answer.ids[: len(answer.fed)], answer.blocks())])[0]


class Seen(NamedTuple):
    """An image: its name, picture (height, width, 3) uint8, and features (rows, columns, H)."""

    name: str
    picture: np.ndarray
    features: torch.Tensor


class Look:
    """One latent block.

    Attributes:
        title: which row, which block, who made the latents.
        similarity: for each image (name, picture, (k, rows, columns) cosines to its features).
        nearest, lens: words of each latent by cosine and by the head; their texts are `spellings`.
        norms: (k,) of the latents; word_norms: (V,) of the input embeddings; feature_norms: (F,) of the input images'
            features.
        to_targets: (k, k) cosine of each latent (row) to each target of the helper (column); None without helper.
        attention: (L, Q, k) from the answer's tokens to the latents, mean over heads.
        shares: (L, 4) what the answer's tokens give to each of PARTS, mean over tokens; rows sum to 1. Earlier
            blocks are text before.
        uniform: what the latents would get on average if every visible token got the same.
        answer: Q spellings of the answer's tokens.
    """

    def __init__(
        self, bench: Bench, thought: Thought, block: int, images: Sequence[Seen], helper: Seen | None, title: str
    ):
        """Measure it.

        Args:
            block: its number in the row, from 0.
            images, helper: the row's input images and the block's own helper, see `see`.
        """
        model, encoder, latents = bench.model, bench.encoder, thought.latents[block]
        start, k = thought.runs[block]
        matrix, embeddings = (one.weight.detach() for one in (model.head, model.language_model.embed_tokens))
        words_known = len(encoder.tokenizer)
        self.title = title
        self.similarity = [
            (one.name, one.picture, measure.cosines(one.features, latents).movedim(-1, 0).cpu())
            for one in (*images, helper)
            if one is not None
        ]
        self.nearest = measure.nearest(latents, matrix[:words_known], WORDS)
        self.lens = measure.lens(latents, matrix, WORDS)
        written = torch.cat([self.nearest.ids, self.lens.ids]).unique().tolist()
        self.spellings = {token: spell(encoder, token) for token in written}
        self.norms = latents.float().norm(dim=-1).cpu()
        self.word_norms = embeddings[:words_known].float().norm(dim=-1).cpu()
        self.feature_norms = thought.images.float().norm(dim=-1).cpu()
        self.to_targets: torch.Tensor | None = None
        if helper is not None:
            targets = measure.targets(helper.features, k, encoder.compress)
            self.to_targets = measure.cosines(latents, targets).cpu()
        queries = thought.answer(block)
        probabilities = attention(model, thought, queries)
        self.attention = probabilities[..., start : start + k]
        self.shares = _shares(encoder, thought, block, probabilities)
        self.uniform = float((k / (queries + 1 - len(thought.hidden)).float()).mean())
        self.answer = [spell(encoder, token) for token in thought.ids[queries].tolist()]


def spell(encoder: Encoder, token: int) -> str:
    """Write a token so that spaces and line ends show."""
    text = str(encoder.tokenizer.decode([token]))
    if not text or "\ufffd" in text:
        # Part of a character, or a row of the matrix that belongs to no token.
        text = str(encoder.tokenizer.convert_ids_to_tokens(token) or f"[{token}]")
    return text.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")


def see(bench: Bench, record: Record, thought: Thought) -> tuple[list[Seen], list[Seen]]:
    """Open a row's images: the input images with the features that the model got, and the helpers with theirs.

    Raises:
        RecordError: a helper image is missing or does not decode.
    """
    encoder = bench.encoder
    inputs: list[Seen] = []
    helpers: list[Seen] = []
    left = thought.images
    for name, path in record.images(helpers=True):
        pixels, grid = encoder.pixels(record, name, [path])
        rows, columns = encoder.sides(grid[0].tolist())
        picture = np.asarray(encoder.finder.load(record, name, path))
        if name == "image_input":
            own, left = left[: rows * columns], left[rows * columns :]
            number = f" {len(inputs) + 1}" if len(record.image_input) > 1 else ""
            inputs.append(Seen(f"input image{number}", picture, own.unflatten(0, (rows, columns))))
        else:
            own = embedded(bench.tower.features(pixels, grid), thought.inputs.shape[1])
            helpers.append(Seen("helper image", picture, own.unflatten(0, (rows, columns))))
    return inputs, helpers


def _shares(encoder: Encoder, thought: Thought, block: int, rows: torch.Tensor) -> torch.Tensor:
    """Sum attention (L, Q, T) over the four PARTS and average over tokens → (L, 4)."""
    places = torch.arange(len(thought.ids))
    start, k = thought.runs[block]
    before, behind = places < start, places >= start + k
    image = thought.ids == encoder.id_of(IMAGE_PAD)
    parts = (image, before & ~image, ~before & ~behind, behind)
    return torch.stack([rows[..., part].sum(-1).mean(1) for part in parts], dim=-1)


def looks(bench: Bench, record: Record, thought: Thought, title: str) -> Iterator[Look]:
    """Measure each latent block of a row.

    Args:
        title: of the row; blocks are counted behind it where there are several.

    Raises:
        RecordError: an image is missing or does not decode.
    """
    images, helpers = see(bench, record, thought)
    for block in range(len(thought.runs)):
        helper = helpers[block] if block < len(helpers) else None
        # Keys of numbers.json and names of pictures: they stay.
        name = f"{title}, run {block + 1}" if len(thought.runs) > 1 else title
        yield Look(bench, thought, block, images, helper, name)


def drawings(one: Look, small: bool = False) -> dict[str, Figure]:
    """Draw all figures of one latent block; `small` as in draw.similarity."""
    from mirage_ds.analysis.inspect import draw, style

    makers = {"similarity": draw.similarity, "words": draw.words, "norms": draw.norms, "attention": draw.attends}
    with style.styled():
        made = {name: make(one, small) for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def figures(bench: Bench, records: Sequence[Record]) -> dict[str, Figure]:
    """Draw the latents of a few rows, answers given, latents fed back as in stage 2, whatever the stage of the model.

    Args:
        bench: of a sharded model engine.whole.whole_model makes a plain one. Nothing is sent to other ranks.
        records: each with a latent block.

    Returns:
        "line 3/similarity", … → figure.

    Raises:
        RecordError: a record cannot be used, or an image is missing or does not decode.
        NotFinite: logits are not.
    """
    bench = replace(bench, encoder=replace(bench.encoder, stage="stage2"))
    found: dict[str, Figure] = {}
    for record in records:
        title = f"line {record.line}"
        thought = taught(bench, [bench.encoder.encode(record, record.line - 1)])[0]
        for one in looks(bench, record, thought, title):
            found |= {f"{one.title}/{name}": figure for name, figure in drawings(one, small=True).items()}
    return found
