"""Every record under every condition.

N rows of a batch, R latent blocks of a row, k latents a block, H hidden.

Two rounds over the records. The first decodes them as usual and keeps the own latents of all; from these the vectors
of the other conditions are made, which the second round feeds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls import teach
from mirage_ds.analysis.controls.conditions import KNOWN, First, Given, Material, choose_partners, forbid
from mirage_ds.analysis.controls.teach import Row, decode, rows_of
from mirage_ds.data.loader import check_records
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Track, answer_of, batches, batches_fit
from mirage_ds.evaluate.scoring import Prediction
from mirage_ds.model.generate import Generated, greedy


class Outcome(NamedTuple):
    """A record under one condition: its answer, and the log-likelihood of the right one (see teach)."""

    answer: Prediction
    log_likelihood: float


def fill(
    name: str, vectors: Sequence[torch.Tensor], bench: Bench, rows: Sequence[Row]
) -> tuple[list[Generated], list[float]]:
    """Fill the slots in another way than `own`: answers to the rows' questions, and their answers' log-likelihood.

    Args:
        vectors: what is fed where it is known beforehand, (R, k, H) for each record by its place.
    """
    if name == "first":
        return decode(bench, rows, First()), teach.first(bench, rows)
    if name == "off":
        # Never emitted, and left out of the answer that is scored.
        return decode(bench, rows, choose=forbid(greedy, bench.tokens)), teach.off(bench, rows)
    fed = [vectors[row.sample.row] for row in rows]
    return decode(bench, rows, Given(fed)), teach.given(bench, rows, fed)


def check(records: Sequence[Record], bench: Bench) -> list[int]:
    """Refuse records that cannot be used, and put the others in an order in which neighbours are alike in length.

    Raises:
        UserError: a faulty record, or one whose answer has no latent block.
    """
    measures = check_records(records, bench.encoder)
    for record, measure in zip(records, measures, strict=True):
        if not measure.runs:
            raise UserError(
                f"record on line {record.line}, text_output: no latent block; write <output_image> where it stands, or "
                "give image_output (the block then stands first)"
            )
    return sorted(range(len(records)), key=lambda i: measures[i].tokens)


def _outcomes(bench: Bench, decoded: Sequence[Generated], log_likelihoods: Sequence[float]) -> list[Outcome]:
    answers = [answer_of(one, bench.encoder) for one in decoded]
    return [Outcome(answer, value) for answer, value in zip(answers, log_likelihoods, strict=True)]


def run_conditions(
    bench: Bench, records: Sequence[Record], names: Sequence[str], seed: int, batch_size: int, track: Track = iter
) -> dict[str, list[Outcome]]:
    """Answer every record under `own` and the conditions named.

    Args:
        records: with answers and latent blocks; with helper images where "oracle" is among `names`.
        seed: of what is drawn; a record's draws do not depend on the records beside it.

    Returns:
        Name → an Outcome a record, in the order given.

    Raises:
        UserError: a record that cannot be used, or a condition that cannot be made of these records.
    """
    order = check(records, bench)
    parts = batches(order, batch_size)
    found: dict[str, dict[int, Outcome]] = {name: {} for name in ("own", *names)}
    latents: dict[int, torch.Tensor] = {}
    targets: dict[int, torch.Tensor] = {}
    for part in track(parts):
        with batches_fit(batch_size):
            rows = rows_of(bench, [records[i] for i in part], part)
            fed, log_likelihoods = teach.own(bench, rows)
            outcomes = _outcomes(bench, decode(bench, rows), log_likelihoods)
        latents |= zip(part, fed, strict=True)
        targets |= {i: row.targets for i, row in zip(part, rows, strict=True) if row.targets is not None}
        found["own"] |= zip(part, outcomes, strict=True)
    places = range(len(records))
    material = Material(
        own=[latents[i] for i in places],
        targets=[targets[i] for i in places if i in targets],
        partners=choose_partners(records, seed) if "swap" in names else [],
        pad=bench.model.language_model.embed_tokens.weight[bench.tokens.pad].detach().cpu(),
        seed=seed,
    )
    others = {name: KNOWN[name](material) if name in KNOWN else [] for name in names if name != "own"}
    for part in track(parts if others else []):
        with batches_fit(batch_size):
            rows = rows_of(bench, [records[i] for i in part], part)
            for name, vectors in others.items():
                found[name] |= zip(part, _outcomes(bench, *fill(name, vectors, bench, rows)), strict=True)
    return {name: [own[i] for i in places] for name, own in found.items()}
