"""Sizes, colours, legends and texts of all figures; inches, and points for letters, unless stated.

Colours are Okabe and Ito's.
"""

import io
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

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
    # What tells names apart is often at their end.
    end = most // 3
    return one if len(one) <= most else f"{one[: most - end - 1]}…{one[-end:]}"


def png(figure: Figure) -> bytes:
    """Write a figure as PNG, the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def panels(
    down: int, across: int, height: float, *, width: float = WIDTH, title: str = "", beside: float = 0, **options: Any
) -> tuple[Figure, Any]:
    """Make a figure with down × across axes.

    Args:
        height: of one row of axes with its labels; beside: what legends take in addition, below all rows.

    Returns:
        (figure, axes of shape (down, across))
    """
    # Two lines at most; a letter is 0.09 inch wide on average.
    letters = int(width / 0.09)
    title = textwrap.fill(legible(title, 2 * letters), letters)
    above = 0.4 + 0.2 * title.count("\n") if title else 0.1
    figure = Figure(figsize=(width, down * height + above + beside), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10.5)
    return figure, figure.subplots(down, across, squeeze=False, **options)


def columns(labels: Sequence[str], width: float = WIDTH) -> int:
    """Return how many columns a legend of these labels has: few enough for the width, and none nearly empty."""
    most = max(1, min(len(labels), int(width / (LETTER * max(map(len, labels)) + 0.5))))
    return -(-len(labels) // -(-len(labels) // most))


def room(labels: Sequence[str], width: float = WIDTH) -> float:
    """Return the height of a legend of these labels."""
    return 0.21 * -(-len(labels) // columns(labels, width)) + 0.15 if labels else 0.0


def legend(figure: Figure, handles: Sequence[Line2D], width: float = WIDTH) -> None:
    """Put a legend below all axes."""
    labels = [str(one.get_label()) for one in handles]
    if labels:
        # matplotlib leaves out labels that begin with an underscore.
        shown = [f"\u200a{label}" if label.startswith("_") else label for label in labels]
        figure.legend(list(handles), shown, loc="outside lower center", ncols=columns(labels, width), fontsize=9)


def dots(axes: Axes, points: Sequence[tuple[float, float]], colour: str = GREY, alpha: float = 0.75) -> None:
    """Draw single seeds as small dots."""
    if points:
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=7, color=colour, alpha=alpha, linewidths=0, zorder=3)


def name_rows(axes: Axes, names: Sequence[str], most: int = 30) -> None:
    """Name the rows 0, 1, … of an axis, the first on top."""
    axes.set_yticks(range(len(names)), [legible(name, most) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def bars(one: dict[str, Any], low: str = "low", high: str = "high") -> tuple[float, float]:
    """Return how far an Estimate's interval reaches to both sides of its mean, 0 where it does not reach it."""
    return max(0.0, one["mean"] - one[low]), max(0.0, one[high] - one["mean"])


def interval(axes: Axes, row: float, one: dict[str, Any], colour: str, mark: str = "o") -> None:
    """Draw an Estimate as a dot with its 95 % interval in a row."""
    sides = [[side] for side in bars(one)]
    axes.errorbar(one["mean"], row, xerr=sides, fmt=mark, color=colour, markersize=5, capsize=2.5, linewidth=1.6)
