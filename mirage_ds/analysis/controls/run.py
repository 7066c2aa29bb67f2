"""Every record under every condition.

N rows of a batch, R runs of a row, k latents a run, H hidden.

Two rounds over the records. The first decodes them as usual and keeps the own latents of all; from these the vectors
of the other conditions are made, which the second round feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch

from mirage_ds.analysis.controls import teach
from mirage_ds.analysis.controls.bench import Bench, Row
from mirage_ds.analysis.controls.conditions import KNOWN, First, Given, Material, choose_partners, forbid
from mirage_ds.data.loader import check_records
from mirage_ds.data.record import Record, RecordError
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import answer_of
from mirage_ds.evaluate.scoring import Answer
from mirage_ds.model.generate import Generated, greedy

Track = Callable[[Sequence[Any]], Iterable[Any]]


class Outcome(NamedTuple):
    """A record under one condition: its answer, and the log-likelihood of the right one (see teach)."""

    answer: Answer
    log_likelihood: float


class Condition(Protocol):
    """One way of filling the slots."""

    def decode(self, bench: Bench, rows: Sequence[Row]) -> list[Generated]:
        """Answer the rows' questions."""

    def log_likelihoods(self, bench: Bench, rows: Sequence[Row]) -> list[float]:
        """Log-likelihood of the rows' own answers."""


class FirstState:
    """The first slot's state at every slot of its run."""

    def decode(self, bench: Bench, rows: Sequence[Row]) -> list[Generated]:
        """See Condition."""
        return bench.decode(rows, First())

    def log_likelihoods(self, bench: Bench, rows: Sequence[Row]) -> list[float]:
        """See Condition."""
        return teach.first(bench, rows)


class NoRun:
    """No latent token at all: never emitted, and left out of the answer that is scored."""

    def decode(self, bench: Bench, rows: Sequence[Row]) -> list[Generated]:
        """See Condition."""
        return bench.decode(rows, choose=forbid(greedy, bench.tokens))

    def log_likelihoods(self, bench: Bench, rows: Sequence[Row]) -> list[float]:
        """See Condition."""
        return teach.off(bench, rows)


class Known:
    """Vectors that are known beforehand, (R, k, H) for each record by its place."""

    def __init__(self, vectors: Sequence[torch.Tensor]):
        self.vectors = vectors

    def _of(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        return [self.vectors[row.sample.row] for row in rows]

    def decode(self, bench: Bench, rows: Sequence[Row]) -> list[Generated]:
        """See Condition."""
        return bench.decode(rows, Given(self._of(rows)))

    def log_likelihoods(self, bench: Bench, rows: Sequence[Row]) -> list[float]:
        """See Condition."""
        return teach.given(bench, rows, self._of(rows))


def make(name: str, material: Material) -> Condition:
    """Make a condition other than `own` by its name."""
    if name in KNOWN:
        return Known(KNOWN[name](material))
    others: dict[str, Condition] = {"first": FirstState(), "off": NoRun()}
    return others[name]


def check(records: Sequence[Record], bench: Bench) -> list[int]:
    """Refuse records that cannot be used, and put the others in an order in which neighbours are alike in length.

    Raises:
        UserError: a faulty record, or one whose answer has no latent run.
    """
    faults, measures = check_records(list(records), bench.encoder)
    if faults:
        raise UserError(f"record on {faults[min(faults)]}")
    for record, measure in zip(records, measures, strict=True):
        if not measure.runs:
            raise UserError(
                f"record on line {record.line}, text_output: no latent run; write <output_image> where it stands, or "
                "give image_output (the run then stands first)"
            )
    return sorted(range(len(records)), key=lambda i: measures[i].tokens)


@contextmanager
def batches_fit(batch_size: int) -> Iterator[None]:
    """Turn what a batch meets on its way into a user's sentence."""
    try:
        yield
    except RecordError as error:
        raise UserError(f"record on {error}") from None
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size {batch_size}: so many rows at a time do not fit into the GPU's memory; lower it, "
            "--max_new_tokens or --max_pixels"
        ) from None


def _outcomes(bench: Bench, decoded: Sequence[Generated], log_likelihoods: Sequence[float]) -> list[Outcome]:
    answers = [answer_of(one, bench.encoder) for one in decoded]
    return [Outcome(answer, value) for answer, value in zip(answers, log_likelihoods, strict=True)]


def run_conditions(
    bench: Bench, records: Sequence[Record], names: Sequence[str], seed: int, batch_size: int, track: Track = iter
) -> dict[str, list[Outcome]]:
    """Answer every record under `own` and the conditions named.

    Args:
        records: with answers and latent runs; with helper images where "oracle" is among `names`.
        seed: of what is drawn; a record's draws do not depend on the records beside it.

    Returns:
        Name → an Outcome a record, in the order given.

    Raises:
        UserError: a record that cannot be used, or a condition that cannot be made of these records.
    """
    order = check(records, bench)
    partners = choose_partners(records, seed) if "swap" in names else None
    parts = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    found: dict[str, dict[int, Outcome]] = {name: {} for name in ("own", *names)}
    latents: dict[int, torch.Tensor] = {}
    targets: dict[int, torch.Tensor] = {}
    for part in track(parts):
        with batches_fit(batch_size):
            rows = bench.rows([records[i] for i in part], part)
            own = teach.own(bench, rows)
            outcomes = _outcomes(bench, bench.decode(rows), own.log_likelihoods)
        latents |= zip(part, own.latents, strict=True)
        targets |= {i: row.targets for i, row in zip(part, rows, strict=True) if row.targets is not None}
        found["own"] |= zip(part, outcomes, strict=True)
    places = range(len(records))
    material = Material(
        own=[latents[i] for i in places],
        targets=[targets[i] for i in places] if len(targets) == len(records) else None,
        partners=partners,
        pad=bench.model.language_model.embed_tokens.weight[bench.tokens.pad].detach().cpu(),
        seed=seed,
    )
    conditions = {name: make(name, material) for name in names if name != "own"}
    for part in track(parts if conditions else []):
        with batches_fit(batch_size):
            rows = bench.rows([records[i] for i in part], part)
            for name, condition in conditions.items():
                outcomes = _outcomes(bench, condition.decode(bench, rows), condition.log_likelihoods(bench, rows))
                found[name] |= zip(part, outcomes, strict=True)
    return {name: [own[i] for i in places] for name, own in found.items()}
