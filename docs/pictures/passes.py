"""Draw the k + 1 passes of stage 2 for docs/inside.md, from the schedule that the trainer makes (data.passes.schedule).

    python docs/pictures/passes.py

Needs matplotlib (the extra `plot`). Colours are Okabe and Ito's; every kind of cell also has its own sign.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mirage_ds.data.passes import PassPlan, schedule

OUT = Path(__file__).with_name("passes.png")
K = 4
# (tokens, first latent) of each row.
ROWS = ((13, 6), (9, 3))
SKY, ORANGE, GREEN = "#56B4E9", "#E69F00", "#009E73"
PALE = 0.22
SIDE = 0.88


def signs(tokens: int, first: int) -> list[tuple[str, str]]:
    """(sign, colour) of each place of a row."""
    before = [("t", SKY)] * (first - 1) + [("S", SKY)]
    latents = [(str(number + 1), ORANGE) for number in range(K)]
    return before + latents + [("E", GREEN)] + [("t", GREEN)] * (tokens - first - K - 1)


def draw_row(axes: Axes, plans: list[PassPlan], number: int) -> None:
    """Draw one row of the batch: places from left to right, passes from top to bottom."""
    tokens, first = ROWS[number]
    start = sum(length for length, _ in ROWS[:number])
    cells = signs(tokens, first)
    seen: set[int] = set()
    for depth, plan in enumerate(plans):
        here = [int(token) - start for token in plan.tokens if start <= token < start + tokens]
        seen |= set(here)
        for place in sorted(seen):
            sign, colour = cells[place]
            runs = place in here
            left, top = place - SIDE / 2, depth - SIDE / 2
            axes.add_patch(Rectangle((left, top), SIDE, SIDE, facecolor=colour, alpha=1 if runs else PALE, linewidth=0))
            axes.text(place, depth, sign, ha="center", va="center", fontsize=9, color="black" if runs else "#777777")
        if depth:
            # What is fed back to this row's first token of the pass, by the plan's own numbers.
            firsts = np.concatenate([[0], np.cumsum(plan.query_lengths)[:-1]])
            member = [int(plan.tokens[one]) - start in here for one in firsts].index(True)
            source = int(plans[depth - 1].tokens[plan.sources[member]]) - start
            axes.annotate(
                "",
                xy=(here[0] - 0.1, depth - SIDE / 2),
                xytext=(source + 0.1, depth - 1 + SIDE / 2 - 0.16),
                arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0},
            )
    axes.set_title(f"row {number + 1}: {tokens} tokens, first latent at {first}", fontsize=10)
    axes.set_xlabel("place in the row")
    axes.set_xticks(range(tokens))
    axes.set_xlim(-0.6, tokens - 0.4)
    axes.set_ylim(len(plans) - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def main() -> None:
    """Write the picture."""
    plans = schedule([tokens for tokens, _ in ROWS], [[(first, K)] for _, first in ROWS], K + 1)
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[tokens for tokens, _ in ROWS], sharey=True)
    for number, axes in enumerate((left, right)):
        draw_row(axes, plans, number)
    names = [
        "0: before the first latent",
        *(f"{one}: latent {one}" for one in range(1, K)),
        f"{K}: latent {K} and the rest",
    ]
    left.set_yticks(range(K + 1), names)
    left.set_ylabel("pass")
    kinds = [
        Patch(color=SKY, label="question and answer before the run, S its start token"),
        Patch(color=ORANGE, label="latents 1 to 4"),
        Patch(color=GREEN, label="E the end token, answer after the run"),
        Patch(color="#bbbbbb", label="pale: not run again, keys and values seen"),
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle(f"Stage 2, k = {K}: {K + 1} passes; an arrow is a hidden state fed back as an input", fontsize=11)
    figure.savefig(OUT, dpi=130)


if __name__ == "__main__":
    main()
