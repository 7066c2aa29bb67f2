"""Evaluation by decoding in the middle of training: a few records answered by the weights as they are, and scored.

N rows to decode, W ranks. The rows are dealt to the ranks; in rounds, each rank answers a batch of its own, and then
all look whether somebody wants them to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from mirage_ds.data.loader import Rows
from mirage_ds.data.record import Fault, Record
from mirage_ds.data.sample import IGNORE, Sample
from mirage_ds.engine.setup import World, agree, everyone, from_rank_zero
from mirage_ds.engine.whole import whole_model
from mirage_ds.errors import Stopped, UserError
from mirage_ds.evaluate.decoder import decode_samples
from mirage_ds.evaluate.scoring import Answer, score
from mirage_ds.model.generate import Limits, NotFinite
from mirage_ds.model.vision import FrozenTower
from mirage_ds.run.stop import never
from mirage_ds.run.whereabouts import UNTOLD, Whereabouts

# Rows that a rank answers at a time.
BATCH = 16


def prompt_of(sample: Sample) -> Sample:
    """Cut a row's Sample down to its prompt: what Encoder.encode_prompt makes, with the features that were kept."""
    end = int((sample.labels != IGNORE).nonzero()[0])
    return sample._replace(
        input_ids=sample.input_ids[:end],
        labels=sample.labels[:end],
        position_ids=sample.position_ids[:, :end],
        runs=(),
        helper_pixel_values=sample.helper_pixel_values[:0],
        helper_grid_thw=sample.helper_grid_thw[:0],
        helper_groups=sample.helper_groups[:0],
        helper_features=None,
    )


def record_at(rows: Rows, row: int) -> Record:
    """Return the record of a dataset row."""
    return rows.records.record(row)


def _prompt_at(rows: Rows, row: int) -> Sample:
    found = rows[row]
    if isinstance(found, Fault):
        # An image that was there when the run began; only this rank knows.
        raise UserError(f"record on {found}", everywhere=False)
    return prompt_of(found)


def decode_rows(
    engine: Any,
    tower: FrozenTower | None,
    rows: Rows,
    chosen: Sequence[int],
    limits: Limits,
    latents: bool,
    world: World,
    asked: Callable[[], bool] = never,
    where: Whereabouts = UNTOLD,
) -> list[Answer] | None:
    """Answer rows with the engine's weights, greedily; None when the ranks stop on request. All ranks call it.

    The weights are gathered once, whatever is decoded, and released at the end.

    Args:
        tower: the frozen tower; None where it is trained, and then stands among the engine's modules.
        rows: encodes the rows, kept features in place of pixels where they are kept.
        chosen: dataset rows.
        latents: whether the model may open latent runs.

    Returns:
        The answers in the order of `chosen`, on every rank.

    Raises:
        NotFinite: on every rank, once all have done their rounds.
    """
    own = list(range(world.rank, len(chosen), world.size))
    rounds = math.ceil(math.ceil(len(chosen) / world.size) / BATCH)
    made: list[tuple[int, Answer]] = []
    broken: list[int] = []
    with whole_model(engine) as model:
        sees = tower or FrozenTower(model.visual)  # type: ignore[arg-type]  # where there is no tower it is trained
        for number in range(rounds):
            part = own[number * BATCH : (number + 1) * BATCH]
            where.at(f"decodes batch {number + 1} of {rounds}")
            try:
                if part:
                    samples = [_prompt_at(rows, chosen[i]) for i in part]
                    answers = decode_samples(
                        *(model, sees, rows.encoder, samples, limits, latents),
                        asked=asked,
                        slots=rows.encoder.slots,
                    )
                    made += zip(part, answers, strict=True)
            except Stopped:
                pass
            except NotFinite as error:
                broken.append(error.row)
            if agree(asked(), world):
                return None
    broken = everyone(broken, world)
    if broken:
        raise NotFinite(min(broken))
    return [answer for _, answer in sorted(everyone(made, world), key=lambda one: one[0])]


def scored(rows: Rows, chosen: Sequence[int], answers: Sequence[Answer], task: str, world: World) -> dict[str, float]:
    """Score answers; every rank gets the same numbers: the scorer's metrics, `count`, `low` and `high` among them."""

    def on_rank_zero() -> dict[str, float]:
        return dict(score([record_at(rows, row) for row in chosen], answers, task)["all"])

    return from_rank_zero(on_rank_zero, world)
