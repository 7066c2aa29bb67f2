"""Draw the site's front page: the passes of one row, and one row of the demo as its own model answers it.

    make demo
    python docs/pictures/landing.py runs/demo/exported runs/demo/test/data.jsonl --row 2

Letters are large for the width: a phone shows the pictures at half their size. Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from passes import GREEN, ORANGE, PALE, SIDE, SKY, K

HERE = Path(__file__).parent
DPI = 160
# Tokens of the drawn row: before the latents, and behind them; the marks are among them.
BEFORE = ("map", "goal?", "⟨")
BEHIND = ("⟩", "LEFT", "LEFT", "…")


def draw_passes() -> Figure:
    """Draw one row: its places from left to right, the passes that run them from top to bottom."""
    latents = [str(one + 1) for one in range(K)]
    parts = ((BEFORE, SKY, "question"), (latents, ORANGE, f"k = {K} latents"), (BEHIND, GREEN, "answer"))
    cells = [(sign, colour) for signs, colour, _ in parts for sign in signs]
    figure = Figure(figsize=(6.2, 3.5), layout="constrained")
    axes = figure.subplots()
    # Pass 0 runs all up to the mark, each other pass one latent, and the last one the rest too.
    ends = [*(len(BEFORE) + one for one in range(K)), len(cells)]
    begin = 0
    for depth, end in enumerate(ends):
        for place, (sign, colour) in enumerate(cells[:end]):
            runs = place >= begin
            corner = (place - SIDE / 2, depth - SIDE / 2)
            axes.add_patch(Rectangle(corner, SIDE, SIDE, facecolor=colour, alpha=1 if runs else PALE, linewidth=0))
            if runs:
                axes.text(place, depth, sign, ha="center", va="center", fontsize=9.5)
        if depth:
            arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "color": "black", "linewidth": 1.4}
            start, tip = (begin - 1 + SIDE / 2, depth - 1), (begin, depth - SIDE / 2)
            axes.add_patch(FancyArrowPatch(start, tip, connectionstyle="arc3,rad=-0.4", **arrow))
        begin = end
    axes.set(xlim=(-0.6, len(cells) - 0.4), ylim=(len(ends) - 0.4, -0.6), aspect="equal", xticks=[])
    axes.set_yticks(range(K + 1), [f"pass {one}" for one in range(K + 1)], fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    left = 0
    for signs, _, name in parts:
        axes.text(left + (len(signs) - 1) / 2, -0.7, name, ha="center", fontsize=12, weight="bold")
        left += len(signs)
    axes.set_xlabel(
        "pale: not run again, its keys and values are kept\narrow: the hidden state is the next input", fontsize=11
    )
    return figure


def _picture(axes: Axes, picture: Any, title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.axis("off")


def draw_example(folder: Path, file: Path, row: int) -> Figure:
    """Draw question, helper, and the answer that the model itself decodes, with its latents.

    Raises:
        click.ClickException: the model opened no latent block.
    """
    from mirage_ds.analysis.bench import Bench
    from mirage_ds.analysis.inspect.look import decoded, looks
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.data.record_files import read_records
    from mirage_ds.evaluate.decoder import load_decoder
    from mirage_ds.model.generate import Limits

    record = read_records(file)[row]
    decoder = load_decoder(folder, ImageFinder.beside(file, None))
    k = int(decoder.trained["latent_size"])
    bench = Bench(decoder.loaded.model, decoder.tower, decoder.latent_encoder("stage2", k), Limits(64, fixed_run=k))
    prompt = bench.encoder.encode_prompt(record, row)
    thought = decoded(bench, prompt)
    if not thought.runs:
        raise click.ClickException(f"the model opens no latent block in row {row}; choose another")
    (look, *_) = looks(bench, record, thought, f"row {row}")
    seen = {name: (picture, cosines) for name, picture, cosines in look.similarity}
    helper, cosines = seen["helper image"]
    text = bench.encoder.tokenizer.decode(thought.ids[len(prompt.input_ids) :], skip_special_tokens=True).strip()

    figure = Figure(figsize=(6.2, 5.4), layout="constrained")
    above, middle, below = figure.subfigures(3, 1, height_ratios=[1.55, 0.5, 1.3])
    one, other = above.subplots(1, 2)
    question = textwrap.fill(record.text_input.replace("<image>", ""), 34)
    _picture(one, seen["input image"][0], f"question: “{question}”")
    _picture(other, helper, "helper: seen in stage 1 alone")
    said = middle.subplots()
    said.axis("off")
    said.text(0.5, 0.72, "the model answers", ha="center", va="center", fontsize=11)
    said.text(0.5, 0.22, f"⟨ {k} latents ⟩  {text}", ha="center", va="center", fontsize=11.5, family="monospace")
    for number, axes in enumerate(below.subplots(1, k)):
        axes.imshow(cosines[number], cmap="viridis")
        axes.set_title(f"latent {number + 1}", fontsize=11)
        axes.axis("off")
    below.supxlabel("bright: where in the helper the latent points (cosine)", fontsize=11)
    return figure


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("records", type=click.Path(path_type=Path))
@click.option("--row", default=2, show_default=True, help="Of the records, from 0.")
def main(folder: Path, records: Path, row: int) -> None:
    """Write passes_row.png and example.png beside this file."""
    for name, figure in (("passes_row", draw_passes()), ("example", draw_example(folder, records, row))):
        figure.savefig(HERE / f"{name}.png", dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    main()
