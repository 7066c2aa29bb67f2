"""Sizes, colours, legends, captions and texts of all figures; inches, and points for letters, unless stated.

Colours are Okabe and Ito's.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

DPI = 110
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8a8a8a"
# As wide as the page's column.
WIDTH = 10.6
# A row of a figure that has one row an arm.
ROW = 0.27
# A letter of the ticks and legends.
LETTER = 0.078
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
DASHES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D")
_STYLE = {
    # Names are texts: a dollar sign in one is no formula.
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def styled() -> AbstractContextManager[Any]:
    """Return the context in which figures are made and written; outside of it nothing is changed."""
    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


# Colour, dashes, marker.
Look = tuple[str, Any, str]


def look(number: int) -> Look:
    """Return colour, dashes and marker of the n-th arm: eight colours, then the same with other dashes."""
    turn = number // len(COLOURS)
    return COLOURS[number % len(COLOURS)], DASHES[turn % len(DASHES)], MARKS[turn % len(MARKS)]


def plain(text: str) -> str:
    """Write the letters that the font lacks by their numbers."""
    font = get_font(findfont(FontProperties()))
    return "".join(letter if font.get_char_index(ord(letter)) else f"\\u{ord(letter):x}" for letter in text)


def legible(text: object, most: int = 38) -> str:
    """Bring a text to one line of at most so many letters; those that the font lacks are written by their numbers."""
    one = plain(" ".join(str(text).split()))
    # matplotlib's legends leave out what begins with an underscore.
    one = f"\u200a{one}" if one.startswith("_") else one
    # What tells names apart is often at their end.
    end = most // 3
    return one if len(one) <= most else f"{one[: most - end - 1]}…{one[-end:]}"


def caption(shows: str, **values: Any) -> str:
    """Say how to read a figure, by what it shows (captions.yaml)."""
    texts = yaml.safe_load(Path(__file__).with_name("captions.yaml").read_text(encoding="utf-8"))
    return str(texts[shows]).format(**values)


def png(figure: Figure) -> bytes:
    """Write a figure as PNG, the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def panels(
    count: int, across: int, height: float, *, width: float = WIDTH, title: str = "", **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels, at most so many beside each other.

    Args:
        height: of a panel with its labels.
    """
    # Two lines at most; a letter is 0.09 inch wide on average.
    letters = int(width / 0.09)
    title = textwrap.fill(legible(title, 2 * letters), letters)
    above = 0.4 + 0.2 * title.count("\n") if title else 0.1
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width, down * height + above), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10.5)
    axes = list(figure.subplots(down, across, squeeze=False, **options).flat)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def legend(figure: Figure) -> None:
    """Put a legend of what has a label below all axes, each label once, and make room for it."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        # As many columns as the width has room for, and none nearly empty.
        most = max(1, int(figure.get_figwidth() / (LETTER * max(map(len, found)) + 0.5)))
        rows = math.ceil(len(found) / most)
        figure.set_figheight(figure.get_figheight() + 0.21 * rows + 0.15)
        place: Any = {"loc": "outside lower center", "ncols": math.ceil(len(found) / rows), "fontsize": 9}
        figure.legend(list(found.values()), list(found), **place)


def dots(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draw single seeds as small dots."""
    if points:
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=7, color=GREY, alpha=0.75, linewidths=0, zorder=3, label="one seed")


def name_rows(axes: Axes, names: Sequence[str], most: int = 30) -> None:
    """Name the rows 0, 1, … of an axis, the first on top."""
    axes.set_yticks(range(len(names)), [legible(name, most) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def bars(one: dict[str, Any]) -> tuple[float, float]:
    """Return how far an Estimate's interval reaches to both sides of its mean, 0 where it does not reach it."""
    return max(0.0, one["mean"] - one["low"]), max(0.0, one["high"] - one["mean"])


def interval(axes: Axes, row: float, one: dict[str, Any], colour: str, mark: str = "o", label: str = "") -> None:
    """Draw an Estimate as a dot with its 95 % interval in a row."""
    shape: dict[str, Any] = {"fmt": mark, "color": colour, "markersize": 5, "capsize": 2.5, "linewidth": 1.6}
    axes.errorbar(one["mean"], row, xerr=[[side] for side in bars(one)], label=label, **shape)
