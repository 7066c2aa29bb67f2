"""A row through the model: its latents, the states that are fed back, and what attends to them.

T tokens of a row, n latents of a row, k latents a block, Q queries, F merged features, H hidden, L layers, D head
width, Hq query heads, Hkv key heads.

A latent is what is fed back at its place: the final-norm hidden state of the position before it.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch.nn import functional

from mirage_ds.analysis.bench import Bench
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.model.attention import Ends, varlen_attention
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import check_finite, generate
from mirage_ds.model.images import Deep, embedded, place_images


class Thought(NamedTuple):
    """One row as the model ran it.

    Attributes:
        ids: (T,) tokens; inputs: (T, H) what was fed at each place; position_ids: (3, T).
        runs: the latent blocks as (first latent's place, latents).
        latents: one (k, H) tensor a block.
        images: (F, H) merged features of the row's input images, as they are fed.
        deep: what they add behind the first layers, in families that have that.
    """

    ids: torch.Tensor
    inputs: torch.Tensor
    position_ids: torch.Tensor
    runs: tuple[tuple[int, int], ...]
    latents: tuple[torch.Tensor, ...]
    images: torch.Tensor
    deep: Deep | None

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
    """Causal attention over one row that also keeps the probabilities of chosen queries: a layer's Context."""

    def __init__(self, queries: torch.Tensor):
        self.queries = queries
        self.mean = torch.empty(0)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend with q (T, Hq, D) to k, v (T, Hkv, D) → (T, Hq, D)."""
        length = len(q)
        # (Q, Hkv, Hq / Hkv, D): neighbouring query heads share a key head.
        chosen = q.index_select(0, self.queries).float().unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("qgrd,tgd->grqt", chosen, k.float()) * scale
        later = torch.arange(length, device=q.device) > self.queries[:, None]
        self.mean = scores.masked_fill(later, float("-inf")).softmax(-1).mean((0, 1))
        whole = torch.tensor([0, length], dtype=torch.int32, device=q.device)
        return varlen_attention(q, k, v, Ends(whole, whole, length, length), scale=scale)


@torch.no_grad()
def attention(model: MirageModel, thought: Thought, queries: torch.Tensor) -> torch.Tensor:
    """Run a row once more, in one causal pass: all its inputs are known now, the fed-back latents too.

    Args:
        queries: (Q,) places.

    Returns:
        (L, Q, T) attention probabilities of the queries, the mean over heads; float32, on the CPU.
    """
    text, device = model.language_model, thought.inputs.device
    x = thought.inputs[None]
    rotary = text.rotary_emb(x, thought.position_ids.to(device)[:, None])
    found = []
    every = torch.arange(len(thought.inputs), device=device)
    for number, layer in enumerate(text.layers):
        recording = _Recording(queries.to(device))
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
    batch, embeddings, states = bench.fed_back(samples)
    assert batch.image_features is not None
    # What is not finite reaches a row's last token: it attends to all others.
    last = states[batch.cu_seqlens[1:].long() - 1]
    check_finite(functional.linear(last, bench.model.head.weight), batch.rows)
    latents = states.index_select(0, batch.latents - 1)
    inputs = embeddings.index_copy(0, batch.latents, latents).split([len(sample.input_ids) for sample in samples])
    images = batch.image_features.split([len(sample.image_positions) for sample in samples])
    each = iter(latents.split([k for sample in samples for _, k in sample.runs]))
    return [
        Thought(
            ids=sample.input_ids,
            inputs=fed,
            position_ids=sample.position_ids,
            runs=sample.runs,
            latents=tuple(islice(each, len(sample.runs))),
            # Of the features (F, (1 + D) · H) what is fed, and what is added behind the first layers.
            images=embedded(seen, fed.shape[1]),
            deep=place_images(fed, seen, sample.image_positions.to(fed.device))[1],
        )
        for sample, fed, seen in zip(samples, inputs, images, strict=True)
    ]


def decoded(bench: Bench, prompt: Sample) -> Thought:
    """Let the model answer a prompt greedily, within bench.limits, and run its answer as if it were given.

    Args:
        prompt: see Encoder.encode_prompt.

    Returns:
        The row without the last token, which was never fed; `runs` is empty where the model opened none.
    """
    answer = generate(bench.model, bench.batch([prompt]), bench.tokens, bench.limits)[0]
    fed, prefix = len(answer.fed), len(prompt.input_ids)
    ids = torch.tensor(answer.ids[:fed], dtype=torch.long)
    onwards = prompt.position_ids.max() + 1 + torch.arange(fed)
    row = prompt._replace(
        input_ids=torch.cat([prompt.input_ids, ids]),
        labels=torch.cat([prompt.labels, torch.full_like(ids, IGNORE)]),
        position_ids=torch.cat([prompt.position_ids, onwards.expand(3, -1)], dim=1),
        runs=tuple((prefix + start, k) for start, k in answer.blocks()),
    )
    return taught(bench, [row])[0]
