"""Pictures of latents while a run trains, drawn by rank 0 from the engine's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mirage_ds.analysis.inspect.live import figures
from mirage_ds.data.loader import Rows
from mirage_ds.data.record import RecordError
from mirage_ds.engine.setup import World, from_rank_zero
from mirage_ds.engine.whole import whole_model
from mirage_ds.errors import UserError
from mirage_ds.model.vision import FrozenTower
from mirage_ds.run.decoding import record_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rows_to_draw(rows: Rows, of: Sequence[int], count: int) -> list[int]:
    """Return the first `count` rows of `of` whose answer has a latent run.

    Raises:
        UserError: none has.
    """
    found: list[int] = []
    for row in of:
        if len(found) < count and record_at(rows, row).runs:
            found.append(row)
    if not found:
        raise UserError(
            f"--eval_pictures {count}: no evaluation record has a latent run to draw; give records with a helper image "
            "or its mark, or leave the flag out"
        )
    return found


def draw_rows(
    engine: Any, tower: FrozenTower | None, rows: Rows, chosen: Sequence[int], world: World
) -> dict[str, Figure]:
    """Draw the latents of rows with the engine's weights, which are gathered once and released. All ranks call it.

    Args:
        tower: the frozen tower; None where it is trained.

    Returns:
        On rank 0 the name and figure of each picture; nothing on the others, which wait.

    Raises:
        UserError: on every rank: an image does not open any more.
    """
    made: dict[str, Figure] = {}
    with whole_model(engine) as model:

        def draw() -> None:
            sees = tower or FrozenTower(model.visual)  # type: ignore[arg-type]  # where there is no tower it is trained
            try:
                made.update(figures(model, rows.encoder, [record_at(rows, row) for row in chosen], sees))
            except RecordError as error:
                raise UserError(f"record on {error.fault}") from None

        from_rank_zero(draw, world)
    return made
