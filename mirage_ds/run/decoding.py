"""A few evaluation records in the middle of training: answered and scored, or drawn, with the weights as they are.

N rows to decode, W ranks. The rows are dealt to the ranks; in rounds, each rank answers a batch of its own, and then
all look whether somebody wants them to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import nn

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect.live import figures
from mirage_ds.data.loader import Rows
from mirage_ds.data.record import Fault, Record, RecordError
from mirage_ds.data.sample import Sample
from mirage_ds.engine.setup import everyone, from_rank_zero
from mirage_ds.engine.whole import whole_model
from mirage_ds.errors import Stopped, UserError
from mirage_ds.evaluate.decoder import decode_samples, prompt_of
from mirage_ds.evaluate.scoring import Prediction
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.generate import Limits, NotFinite
from mirage_ds.model.vision import FrozenTower
from mirage_ds.run.settings import Run
from mirage_ds.run.setup import Learner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows that a rank answers at a time.
BATCH = 16


def _tower_of(learner: Learner, model: MirageModel) -> FrozenTower:
    """Return the vision tower: the frozen one, or, where it is trained, the model's own."""
    return learner.tower or FrozenTower(cast(nn.Module, model.visual))


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
    run: Run, learner: Learner, rows: Rows, chosen: Sequence[int], limits: Limits
) -> list[Prediction] | None:
    """Answer rows with the engine's weights, greedily; None when the ranks stop on request. All ranks call it.

    The weights are gathered once, whatever is decoded, and released at the end.

    Args:
        rows: encodes the rows, kept features in place of pixels where they are kept.
        chosen: dataset rows.

    Returns:
        The answers in the order of `chosen`, on every rank.

    Raises:
        NotFinite: on every rank, once all have done their rounds.
    """
    world = run.world
    # Whether the model may open latent blocks.
    latents = run.config.stage != "sft" or run.config.slots is not None
    own = list(range(world.rank, len(chosen), world.size))
    rounds = math.ceil(math.ceil(len(chosen) / world.size) / BATCH)
    made: list[tuple[int, Prediction]] = []
    broken: list[int] = []
    with whole_model(learner.engine) as model:
        tower = _tower_of(learner, model)
        for number in range(rounds):
            part = own[number * BATCH : (number + 1) * BATCH]
            run.journal.at(f"decodes batch {number + 1} of {rounds}")
            try:
                if part:
                    samples = [_prompt_at(rows, chosen[i]) for i in part]
                    answers = decode_samples(
                        model, tower, rows.encoder, samples, limits, latents, asked=run.asked, slots=rows.encoder.slots
                    )
                    made += zip(part, answers, strict=True)
            except Stopped:
                pass
            except NotFinite as error:
                broken.append(error.row)
            if run.stops():
                return None
    broken = everyone(broken, world)
    if broken:
        raise NotFinite(min(broken))
    return [answer for _, answer in sorted(everyone(made, world), key=lambda one: one[0])]


def rows_to_draw(rows: Rows, of: Sequence[int], count: int) -> list[int]:
    """Return the first `count` rows of `of` whose answer has a latent block.

    Raises:
        UserError: none has.
    """
    found: list[int] = []
    for row in of:
        if len(found) < count and record_at(rows, row).runs:
            found.append(row)
    if not found:
        raise UserError(
            f"--eval_pictures {count}: no evaluation record has a latent block to draw; give records with a helper "
            "image or its mark, or leave the flag out"
        )
    return found


def draw_rows(run: Run, learner: Learner, rows: Rows, chosen: Sequence[int]) -> dict[str, Figure]:
    """Draw the latents of rows with the engine's weights, which are gathered once and released. All ranks call it.

    Returns:
        On rank 0 the name and figure of each picture; nothing on the others, which wait.

    Raises:
        UserError: on every rank: an image does not open any more.
    """
    made: dict[str, Figure] = {}
    with whole_model(learner.engine) as model:

        def draw() -> None:
            bench = Bench(model, _tower_of(learner, model), rows.encoder)
            try:
                made.update(figures(bench, [record_at(rows, row) for row in chosen]))
            except RecordError as error:
                raise UserError(f"record on {error.fault}") from None

        from_rank_zero(draw, run.world)
    return made
