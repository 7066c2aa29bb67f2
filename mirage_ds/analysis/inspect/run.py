"""A row through the model: its latents, the states that are fed back, and what attends to them.

T tokens of a row, n latents of a row, k latents a block, Q queries, F merged features, H hidden, L layers, D head
width, Hq query heads, Hkv key heads.

A latent is what is fed back at its place: the final-norm hidden state of the position before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from mirage_ds.data.batch import Batch
from mirage_ds.data.encode import Encoder
from mirage_ds.data.sample import Sample
from mirage_ds.evaluate.decoder import pack
from mirage_ds.model.attention import Ends, varlen_attention
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import Generated, Limits, check_finite, generate, latent_tokens
from mirage_ds.model.images import Deep, embedded, place_images
from mirage_ds.model.latents import in_order, run_passes
from mirage_ds.model.vision import FrozenTower


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


def _batch(
    model: MirageModel, tower: FrozenTower, encoder: Encoder, samples: Sequence[Sample], passes: int
) -> tuple[Batch, torch.Tensor]:
    """Pack rows; return with them the features of their images."""
    batch = pack(model, tower, encoder, samples, passes)
    assert batch.image_features is not None
    return batch, batch.image_features


def _images(inputs: torch.Tensor, features: torch.Tensor, sample: Sample) -> tuple[torch.Tensor, Deep | None]:
    """Split a row's features (F, (1 + D) · H) into what is fed and what is added behind the first layers."""
    _, deep = place_images(inputs, features, sample.image_positions.to(inputs.device))
    return embedded(features, inputs.shape[1]), deep


@torch.no_grad()
def taught(model: MirageModel, tower: FrozenTower, encoder: Encoder, samples: Sequence[Sample]) -> list[Thought]:
    """Run encoded rows with their answers given and their latents fed back, as stage 2 does, whatever the stage.

    Args:
        model: its reduction and stage do not matter.
        samples: rows of a stage2 encoder, each with at least one latent block.

    Returns:
        One Thought a row.

    Raises:
        NotFinite: a row's logits are not.
    """
    passes = max(sum(k for _, k in sample.runs) for sample in samples) + 1
    batch, features = _batch(model, tower, encoder, samples, passes)
    text = model.language_model
    embeddings = text.embed_tokens(batch.input_ids)
    embeddings, deep = place_images(embeddings, features, batch.image_positions)
    hidden = run_passes(text, embeddings, batch.position_ids, batch.passes, model.how.attention, False, deep=deep)
    states = in_order(hidden, batch.passes)
    # What is not finite reaches a row's last token: it attends to all others.
    check_finite(functional.linear(states[batch.cu_seqlens[1:].long() - 1], model.head.weight), batch.rows)
    latents = states.index_select(0, batch.latents - 1)
    inputs = embeddings.index_copy(0, batch.latents, latents)
    lengths = [len(sample.input_ids) for sample in samples]
    images = features.split([len(sample.image_positions) for sample in samples])
    each = latents.split([k for sample in samples for _, k in sample.runs])
    rows, at = [], 0
    for sample, fed, seen in zip(samples, inputs.split(lengths), images, strict=True):
        runs = each[at : at + len(sample.runs)]
        at += len(runs)
        own = _images(fed, seen, sample)
        rows.append(Thought(sample.input_ids, fed, sample.position_ids, sample.runs, tuple(runs), *own))
    return rows


@torch.no_grad()
def decoded(
    model: MirageModel, tower: FrozenTower, encoder: Encoder, samples: Sequence[Sample], limits: Limits
) -> list[Thought]:
    """Let the model answer greedily, and take the latents it made.

    Args:
        samples: prompts (Encoder.encode_prompt).

    Returns:
        One Thought a row, without the last token, which was never fed; `runs` is empty where the model opened none.
    """
    batch, features = _batch(model, tower, encoder, samples, 1)
    answers = generate(model, batch, latent_tokens(encoder), limits, trace=True)
    embeddings = model.language_model.embed_tokens(batch.input_ids)
    embeddings, _ = place_images(embeddings, features, batch.image_positions)
    prompts = embeddings.split([len(sample.input_ids) for sample in samples])
    images = features.split([len(sample.image_positions) for sample in samples])
    return [
        _thought(sample, answer, prompt, seen)
        for sample, answer, prompt, seen in zip(samples, answers, prompts, images, strict=True)
    ]


def _thought(sample: Sample, answer: Generated, prompt: torch.Tensor, images: torch.Tensor) -> Thought:
    prefix, fed = len(sample.input_ids), len(answer.fed)
    # The first forward's input is the prompt's last token, which stands in the prompt already.
    inputs = torch.cat([prompt, *(one[None] for one in answer.inputs[1:])])
    runs = [(prefix + start, k) for start, k in answer.blocks()]
    onwards = sample.position_ids.max() + 1 + torch.arange(fed)
    own, deep = _images(inputs, images, sample)
    return Thought(
        ids=torch.cat([sample.input_ids, torch.tensor(answer.ids[:fed], dtype=torch.long)]),
        inputs=inputs,
        position_ids=torch.cat([sample.position_ids, onwards.expand(3, -1)], dim=1),
        runs=tuple(runs),
        latents=tuple(inputs[start : start + k] for start, k in runs),
        images=own,
        deep=deep,
    )
