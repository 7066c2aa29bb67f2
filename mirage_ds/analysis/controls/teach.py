"""The likelihood of a given answer behind given latents.

T tokens of the packed rows, N rows, A scored tokens of a row, C of a chunk, R latent blocks of a row, k latents a
block, H hidden, V vocabulary.

A row's log-likelihood is the mean over its scored tokens of their log-probability among the tokens that are no latent
tokens. So it is one measure for all conditions: without a latent block the model would open one if it could.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from mirage_ds.analysis.controls.bench import Bench, Row, without_blocks
from mirage_ds.data.batch import Batch
from mirage_ds.model.images import Deep, place_images
from mirage_ds.model.latents import in_order, run_passes


class Own(NamedTuple):
    """What the model does with its own states: each row's latents (R, k, H), and its log-likelihood."""

    latents: list[torch.Tensor]
    log_likelihoods: list[float]


def _inputs(bench: Bench, batch: Batch) -> tuple[torch.Tensor, Deep | None]:
    """Input embeddings (T, H) with the images in place; a slot holds the embedding of its pad token."""
    embeddings = bench.model.language_model.embed_tokens(batch.input_ids)
    assert batch.image_features is not None
    return place_images(embeddings, batch.image_features, batch.image_positions)


def _hidden(bench: Bench, batch: Batch, inputs: torch.Tensor, deep: Deep | None) -> torch.Tensor:
    """Final-norm hidden states (T, H) of the packed rows, in the batch's passes."""
    model = bench.model
    text, backend = model.language_model, model.how.attention
    passes = run_passes(text, inputs, batch.position_ids, batch.passes, backend, checkpointing=False, deep=deep)
    return in_order(passes, batch.passes)


def _log_likelihoods(bench: Bench, rows: Sequence[Row], batch: Batch, hidden: torch.Tensor) -> list[float]:
    starts = batch.cu_seqlens[:-1].tolist()
    places = torch.cat([row.scored + start for row, start in zip(rows, starts, strict=True)]).to(hidden.device)
    head, (pad, start, end, _) = bench.model.head, bench.tokens
    barred = torch.tensor([pad, start, end], device=hidden.device)
    found = []
    # (C, V) logits at a time, within the budget that training has.
    for states, targets in zip(
        hidden[places - 1].split(head.chunk), batch.input_ids[places].split(head.chunk), strict=True
    ):
        logits = functional.linear(states, head.weight)
        # At least float32; a model in float64 keeps what it has.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill(-1, barred, float("-inf"))
        found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    each = torch.cat(found).double().cpu().split([len(row.scored) for row in rows])
    return [float(one.mean()) for one in each]


@torch.no_grad()
def own(bench: Bench, rows: Sequence[Row]) -> Own:
    """Feed every latent block the states before its slots, as stage 2 does, whatever the model's stage."""
    passes = 1 + max(sum(k for _, k in row.sample.runs) for row in rows)
    batch = bench.batch([row.sample for row in rows], passes)
    hidden = _hidden(bench, batch, *_inputs(bench, batch))
    fed = hidden[batch.latents - 1].cpu().unflatten(0, (-1, bench.encoder.latent_size))
    return Own(list(fed.split([len(row.sample.runs) for row in rows])), _log_likelihoods(bench, rows, batch, hidden))


@torch.no_grad()
def given(bench: Bench, rows: Sequence[Row], vectors: Sequence[torch.Tensor]) -> list[float]:
    """Log-likelihood of each row with known vectors, (R, k, H) a row, at its slots; blocks it lacks are not fed."""
    batch = bench.batch([row.sample for row in rows])
    inputs, deep = _inputs(bench, batch)
    fed = torch.cat([one[: len(row.sample.runs)].flatten(0, 1) for row, one in zip(rows, vectors, strict=True)]).to(
        inputs.device, inputs.dtype
    )
    hidden = _hidden(bench, batch, inputs.index_copy(0, batch.latents, fed), deep)
    return _log_likelihoods(bench, rows, batch, hidden)


@torch.no_grad()
def first(bench: Bench, rows: Sequence[Row]) -> list[float]:
    """Log-likelihood of each row with the state before a latent block at all of the block's slots."""
    batch = bench.batch([row.sample for row in rows])
    inputs, deep = _inputs(bench, batch)
    # (N_runs, k) places of the slots, and which of its row's blocks each is.
    slots = batch.latents.unflatten(0, (-1, bench.encoder.latent_size))
    number = torch.cat([torch.arange(len(row.sample.runs)) for row in rows]).to(slots.device)
    # A block's state depends on the blocks before it: all rows' first blocks, then their second …
    for block in range(int(number.max()) + 1):
        now = slots[number == block]
        states = _hidden(bench, batch, inputs, deep)[now[:, 0] - 1]
        inputs = inputs.index_copy(0, now.flatten(), states.repeat_interleave(now.shape[1], dim=0))
    return _log_likelihoods(bench, rows, batch, _hidden(bench, batch, inputs, deep))


@torch.no_grad()
def off(bench: Bench, rows: Sequence[Row]) -> list[float]:
    """Log-likelihood of each row with its latent blocks left out."""
    shorter = [without_blocks(row, bench.tokens) for row in rows]
    batch = bench.batch([row.sample for row in shorter])
    return _log_likelihoods(bench, shorter, batch, _hidden(bench, batch, *_inputs(bench, batch)))
