"""Rows with their latent blocks, batch by batch, and the likelihood of a given answer behind given latents.

T tokens of the packed rows, N rows, A scored tokens of a row, C of a chunk, R latent blocks of a row, k latents a
block, F image features, H hidden, V vocabulary.

A row's log-likelihood is the mean over its scored tokens of their log-probability among the tokens that are no latent
tokens. So it is one measure for all conditions: without a latent block the model would open one if it could.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls.conditions import Together
from mirage_ds.data.batch import Batch
from mirage_ds.data.loader import check_records
from mirage_ds.data.record import Record
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Track, batches, batches_fit
from mirage_ds.evaluate.prompts import prompt_of, without_helpers
from mirage_ds.evaluate.scoring import Prediction
from mirage_ds.model.generate import check_room, generate
from mirage_ds.model.latents import compress
from mirage_ds.model.rows import Generated
from mirage_ds.model.slots import Latents, LatentTokens


class Outcome(NamedTuple):
    """A record under one condition: its answer, and the log-likelihood of the right one."""

    answer: Prediction
    log_likelihood: float


class Row(NamedTuple):
    """A record with its answer and its latent blocks.

    Attributes:
        sample: the encoded row; its images are features already.
        scored: (A,) places of the answer's text behind the first latent block: the likelihood is of these.
        targets: (R, k, H) the helpers' compressed features, where the encoder is stage1's.
    """

    sample: Sample
    scored: torch.Tensor
    targets: torch.Tensor | None


def scored_places(sample: Sample, tokens: LatentTokens) -> torch.Tensor:
    """Places of the text behind the first latent block, up to the token that ends the answer; no latent tokens."""
    ids, (start, k) = sample.input_ids, sample.runs[0]
    places = torch.arange(len(ids))
    last = places[torch.isin(ids, torch.tensor(tokens.stops))].max()
    latent = torch.isin(ids, torch.tensor([tokens.pad, tokens.start, tokens.end]))
    return places[(places >= start + k) & (places <= last) & ~latent & (sample.labels != IGNORE)]


def without_blocks(row: Row, tokens: LatentTokens) -> Row:
    """Leave a row's latent blocks out, start and end tokens too; what follows moves up, positions with it.

    Where text behind latents does not see the images (Sample.hidden), what follows does not either.
    """
    sample = row.sample
    latent = torch.isin(sample.input_ids, torch.tensor([tokens.pad, tokens.start, tokens.end]))
    # Blocks stand in the answer, where all is text: one place a token on all three axes.
    before = latent.cumsum(0)
    shorter = sample._replace(
        input_ids=sample.input_ids[~latent],
        labels=sample.labels[~latent],
        position_ids=(sample.position_ids - before)[:, ~latent],
        # One block without a latent, where the first one began.
        runs=((sample.runs[0][0] - 1, 0),),
    )
    return row._replace(sample=shorter, scored=row.scored - before[row.scored])


@torch.no_grad()
def rows_of(bench: Bench, records: Sequence[Record], places: Sequence[int]) -> list[Row]:
    """Encode records and run the tower on their images.

    Args:
        bench: with the encoder of stage1 where the helpers' targets are wanted, else of stage2.
        places: the records' places in their file.

    Raises:
        RecordError: an image does not decode.
    """
    encoder = bench.encoder
    samples = [encoder.encode(record, place) for record, place in zip(records, places, strict=True)]
    batch = bench.batch(samples)
    assert batch.image_features is not None
    assert batch.helper_features is not None
    features = batch.image_features.split([len(sample.image_positions) for sample in samples])
    targets: list[torch.Tensor | None] = [None] * len(samples)
    if encoder.stage == "stage1":
        blocks = compress(batch.helper_features, batch, bench.model.head.weight.shape[1]).cpu()
        blocks = blocks.unflatten(0, (-1, encoder.latent_size))
        targets = list(blocks.split([len(sample.runs) for sample in samples]))
    return [
        # Features in place of pixels; helpers have done their part.
        Row(
            without_helpers(sample)._replace(image_features=own, pixel_values=sample.pixel_values[:0]),
            scored_places(sample, bench.tokens),
            target,
        )
        for sample, own, target in zip(samples, features, targets, strict=True)
    ]


def check(records: Sequence[Record], bench: Bench, answers: int = 1) -> list[int]:
    """Refuse records that cannot be used, and put the others in an order in which neighbours are alike in length.

    Args:
        answers: that a question gets at once.

    Raises:
        UserError: a faulty record, one whose answer has no latent block, or one that --cache_gb has no room for.
    """
    measures = check_records(records, bench.encoder)
    for record, measure in zip(records, measures, strict=True):
        if not measure.runs:
            how = "write <output_image> where it stands, or give image_output (the block then stands first)"
            raise UserError(f"record on line {record.line}, text_output: no latent block; {how}")
    prompts = [one.tokens - one.labels - one.runs * bench.encoder.latent_size for one in measures]
    check_room(bench.model, prompts, range(len(prompts)), bench.limits, answers)
    return sorted(range(len(records)), key=lambda i: measures[i].tokens)


def in_batches(
    bench: Bench, records: Sequence[Record], order: Sequence[int], size: int, track: Track, work: Callable[..., Any]
) -> list[Any]:
    """Do `work` on the rows of batch after batch; return what it gives for each row, in the order of the records.

    Args:
        order: see check; work: rows of a batch → something for each of them.

    Raises:
        UserError: an image does not decode, or a batch does not fit.
    """
    found: dict[int, Any] = {}
    for part in track(batches(order, size)):
        with batches_fit(size):
            found |= zip(part, work(rows_of(bench, [records[i] for i in part], part)), strict=True)
    return [found[i] for i in range(len(records))]


def decode(
    bench: Bench, rows: Sequence[Row], latents: Sequence[Latents | None], off: int | None = None
) -> list[list[Generated]]:
    """Answer the rows' questions under several conditions at once; each question is read once.

    Args:
        latents, off: see conditions.Together.

    Returns:
        The answers of each condition.
    """
    prompts = bench.prompts([prompt_of(row.sample) for row in rows])._replace(answers=len(latents), off=off)
    feed = Together(latents, off, bench.tokens)
    made = generate(bench.model, prompts, bench.tokens, bench.limits, feed.choose, latents=feed)
    return [made[number :: len(latents)] for number in range(len(latents))]


def _log_likelihoods(bench: Bench, rows: Sequence[Row], batch: Batch, hidden: torch.Tensor) -> list[float]:
    starts = batch.cu_seqlens[:-1].tolist()
    places = torch.cat([row.scored + start for row, start in zip(rows, starts, strict=True)]).to(hidden.device)
    head, (pad, start, end, _) = bench.model.head, bench.tokens
    barred = torch.tensor([pad, start, end], device=hidden.device)
    found = []
    # (C, V) logits at a time, within the budget that training has.
    most, _ = head.parts(len(places))
    for states, targets in zip(hidden[places - 1].split(most), batch.input_ids[places].split(most), strict=True):
        logits = functional.linear(states, head.weight)
        # At least float32; a model in float64 keeps what it has.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill(-1, barred, float("-inf"))
        found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    each = torch.cat(found).double().cpu().split([len(row.scored) for row in rows])
    return [float(one.mean()) for one in each]


@torch.no_grad()
def own(bench: Bench, rows: Sequence[Row]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Feed the model's own states.

    Returns:
        Of each row what was fed at its slots (R, k, H), the states before these, fed or made anew by the last of
        --latent_passes, and its log-likelihood.
    """
    batch, inputs, hidden = bench.fed_back([row.sample for row in rows])
    fed, states = (
        one.cpu().unflatten(0, (-1, bench.encoder.latent_size)).split([len(row.sample.runs) for row in rows])
        for one in (inputs[batch.latents], bench.model.feed(hidden[batch.latents - 1]))
    )
    return list(fed), list(states), _log_likelihoods(bench, rows, batch, hidden)


@torch.no_grad()
def given(bench: Bench, rows: Sequence[Row], vectors: Sequence[torch.Tensor]) -> list[float]:
    """Log-likelihood of each row with known vectors, (R, k, H) a row, at its slots; blocks it lacks are not fed."""
    batch = bench.batch([row.sample for row in rows])
    inputs, deep = bench.inputs(batch)
    fed = torch.cat([one[: len(row.sample.runs)].flatten(0, 1) for row, one in zip(rows, vectors, strict=True)]).to(
        inputs.device, inputs.dtype
    )
    hidden = bench.hidden(batch, inputs.index_copy(0, batch.latents, fed), deep)
    return _log_likelihoods(bench, rows, batch, hidden)


@torch.no_grad()
def first(bench: Bench, rows: Sequence[Row]) -> list[float]:
    """Log-likelihood of each row with the state before a latent block at all of the block's slots."""
    batch = bench.batch([row.sample for row in rows])
    inputs, deep = bench.inputs(batch)
    # (N_runs, k) places of the slots, and which of its row's blocks each is.
    slots = batch.latents.unflatten(0, (-1, bench.encoder.latent_size))
    number = torch.cat([torch.arange(len(row.sample.runs)) for row in rows]).to(slots.device)
    # A block's state depends on the blocks before it: all rows' first blocks, then their second …
    for block in range(int(number.max()) + 1):
        now = slots[number == block]
        # Without a pass that feeds back, a first slot is fed what it has learned.
        parallel = bench.encoder.latent_passes == 0
        states = inputs[now[:, 0]] if parallel else bench.hidden(batch, inputs, deep)[now[:, 0] - 1]
        inputs = inputs.index_copy(0, now.flatten(), states.repeat_interleave(now.shape[1], dim=0))
    return _log_likelihoods(bench, rows, batch, bench.hidden(batch, inputs, deep))


@torch.no_grad()
def off(bench: Bench, rows: Sequence[Row]) -> list[float]:
    """Log-likelihood of each row with its latent blocks left out."""
    shorter = [without_blocks(row, bench.tokens) for row in rows]
    batch = bench.batch([row.sample for row in shorter])
    return _log_likelihoods(bench, shorter, batch, bench.hidden(batch, *bench.inputs(batch)))
