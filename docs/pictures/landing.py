"""Draw the passes of one row for the site's front page, whose other picture is runs/demo/latents.png of `make demo`.

    python docs/pictures/landing.py

Letters are large for the width: a phone shows the picture at half its size. Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

from pathlib import Path

import click
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


@click.command()
def main() -> None:
    """Write passes_row.png beside this file."""
    draw_passes().savefig(HERE / "passes_row.png", dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    main()
