"""Figures of a few rows, for a run that is training: TensorBoard takes them with `SummaryWriter.add_figure`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect.look import Look, look, see
from mirage_ds.analysis.inspect.run import Thought, taught
from mirage_ds.data.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        yield look(bench, thought, block, images, helper, name)


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
