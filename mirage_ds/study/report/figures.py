"""The report's dict → figures of scores, contrasts and cost. What has nothing to show gives no figure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mirage_ds.analysis.inspect.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LETTER,
    ORANGE,
    ROW,
    VERMILLION,
    WIDTH,
    dots,
    interval,
    legend,
    legible,
    name_rows,
    panels,
    room,
)
from mirage_ds.study.report.tables import judged, levels_of

Report = Mapping[str, Any]


class Drawn(NamedTuple):
    """A figure, the stem of its file's name, and how to read it."""

    name: str
    figure: Figure
    caption: str


def slug(*texts: str) -> str:
    """Return texts as a file's name without odd characters."""
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "x" for text in texts)[:80]


def scores(report: Report) -> list[Drawn]:
    """Draw each evaluation's scores, an arm a row, overall and level by level."""
    drawn = []
    for evaluation in dict.fromkeys(name for arm in report["arms"] for name in arm["evaluations"]):
        arms = [arm for arm in report["arms"] if evaluation in arm["evaluations"]]
        found = [arm["evaluations"][evaluation] for arm in arms]
        levels = levels_of(report, evaluation)
        # One level is the same as all.
        parts: list[str | None] = [None, *(levels if len(levels) > 1 else [])]
        across = min(3, len(parts))
        down = -(-len(parts) // across)
        handles = _score_handles(report, evaluation)
        beside = room([str(one.get_label()) for one in handles])
        figure, grid = panels(
            down,
            across,
            ROW * len(arms) + 0.75,
            title=f"{evaluation}: {found[0]['metric']}",
            beside=beside,
            sharex=True,
            sharey=True,
        )
        for number, axes in enumerate(grid.flat):
            if number < len(parts):
                _score_panel(axes, report, evaluation, found, parts[number])
                # Where the row below has no panel in this column, the axis is named here.
                axes.tick_params(labelbottom=number + across >= len(parts))
                axes.tick_params(axis="y", length=0)
                axes.set_xlabel(f"{legible(found[0]['metric'])}, mean" if number + across >= len(parts) else "")
            else:
                axes.set_visible(False)
        name_rows(grid[0, 0], [arm["name"] for arm in arms])
        legend(figure, handles)
        caption = (
            f"Evaluation {evaluation}: mean {found[0]['metric']} of each arm with its 95 % interval over seeds and "
            "records; small dots are single seeds."
        )
        drawn.append(Drawn(slug("scores", evaluation), figure, caption))
    return drawn


def _reference(report: Report, evaluation: str) -> str | None:
    """Return the base of the primary contrast where it is about this evaluation."""
    primary = report["primary"]
    return primary["base"] if primary and not primary["problem"] and primary["evaluation"] == evaluation else None


def _score_handles(report: Report, evaluation: str) -> list[Line2D]:
    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=5, label="mean, 95 % interval"),
        Line2D([], [], color=GREY, marker="o", markersize=3, linestyle="", label="one seed"),
    ]
    base = _reference(report, evaluation)
    if base is not None:
        label = f"mean of {legible(base)}"
        handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label=label))
    return handles


def _score_panel(
    axes: Axes, report: Report, evaluation: str, found: Sequence[Mapping[str, Any]], level: str | None
) -> None:
    estimates = [one["overall"] if level is None else one["levels"].get(level) for one in found]
    for row, one in enumerate(estimates):
        if one is not None:
            interval(axes, row, one, BLUE)
    seeds = [
        (seed["score"] if level is None else seed["levels"][level]["score"], row + 0.24)
        for row, one in enumerate(found)
        for seed in one["by_seed"]
        if level is None or level in seed["levels"]
    ]
    dots(axes, seeds)
    base = _reference(report, evaluation)
    names = [arm["name"] for arm in report["arms"] if evaluation in arm["evaluations"]]
    if base in names and estimates[names.index(base)] is not None:
        axes.axvline(estimates[names.index(base)]["mean"], color=BLACK, linestyle="--", linewidth=1, zorder=1)
    axes.set_title("all records" if level is None else f"level {legible(level)}")
    axes.grid(axis="x")


def contrasts(report: Report) -> list[Drawn]:
    """Draw the contrasts as a forest, with the margin as a band."""
    found = [one for one in (report["primary"], *report["contrasts"]) if one is not None and not one["problem"]]
    if not found:
        return []
    margin, first = report["margin"], report["primary"]
    handles = [
        Line2D([], [], color=VERMILLION, marker="o", markersize=5, label="primary, 95 % interval"),
        Line2D([], [], color=BLUE, marker="o", markersize=5, label="other, 95 % interval"),
        Line2D([], [], color=BLACK, linewidth=4, alpha=0.35, label="90 % interval"),
        Line2D([], [], color=GREY, marker="o", markersize=3, linestyle="", label="one seed"),
        Line2D([], [], color=GREEN, linewidth=8, alpha=0.2, label=f"± {margin:g}"),
    ]
    handles = handles if found[0] is first else handles[1:]
    beside = room([str(one.get_label()) for one in handles])
    figure, grid = panels(1, 1, 0.36 * len(found) + 0.75, title="Differences between arms", beside=beside)
    axes = grid[0, 0]
    axes.axvspan(-margin, margin, color=GREEN, alpha=0.15, linewidth=0)
    axes.axvline(0, color=BLACK, linewidth=1)
    for row, one in enumerate(found):
        colour = VERMILLION if one is first else BLUE
        apart = one["difference"]
        axes.plot([apart["low90"], apart["high90"]], [row, row], color=colour, linewidth=5, alpha=0.35)
        interval(axes, row, apart, colour)
    dots(axes, [(seed["difference"], row + 0.25) for row, one in enumerate(found) for seed in one["by_seed"]])
    name_rows(axes, [_pair(one, found) for one in found], 70)
    words = axes.secondary_yaxis("right")
    words.set_yticks(range(len(found)), [judged(one, margin).replace(", and", ",\nand") for one in found])
    words.tick_params(length=0)
    words.spines["right"].set_visible(False)
    metrics = dict.fromkeys(legible(one["metric"]) for one in found)
    axes.set_xlabel(f"difference in {', '.join(metrics)} (arm − base)")
    axes.grid(axis="x")
    legend(figure, handles)
    caption = (
        f"Arm − base, paired by seed and record. Green: within ± {margin:g}. A 90 % interval inside it means "
        "equivalent; a 95 % interval without 0 means higher or lower, if the test agrees."
    )
    return [Drawn("contrasts", figure, caption)]


def _pair(contrast: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """Name a contrast, with its evaluation and levels where the others have other ones."""
    text = f"{legible(contrast['arm'], 24)} − {legible(contrast['base'], 24)}"
    if len({one["evaluation"] for one in among}) > 1:
        text += f", {legible(contrast['evaluation'], 14)}"
    if len({tuple(one["levels"]) for one in among}) > 1:
        text += f", level {', '.join(contrast['levels'])}" if contrast["levels"] else ", all levels"
    return text


# Key of a cost, its title, its unit.
_COSTS = (
    ("seconds", "time of all steps", "s"),
    ("samples_s", "speed", "samples/s"),
    ("flops", "model FLOPs", "FLOP"),
    ("peak_gb", "peak memory of a rank", "GB"),
)


def cost(report: Report) -> list[Drawn]:
    """Draw what a chain of each arm cost."""
    arms = [arm for arm in report["arms"] if any(arm["cost"][key] for key, _, _ in _COSTS)]
    shown = [part for part in _COSTS if any(arm["cost"][part[0]] for arm in arms)]
    if not shown:
        return []
    longest = max(len(legible(arm["name"], 30)) for arm in arms)
    width = min(WIDTH, LETTER * longest + 2.3 * len(shown) + 0.4)
    figure, grid = panels(1, len(shown), ROW * len(arms) + 0.75, title="Cost of a chain", width=width, sharey=True)
    for axes, (key, title, unit), colour in zip(grid[0], shown, (BLUE, GREEN, ORANGE, VERMILLION), strict=False):
        means = [arm["cost"][key] for arm in arms]
        scale, named = _scaled(max(one for one in means if one is not None), key, unit)
        axes.barh(range(len(arms)), [(one or 0) / scale for one in means], color=colour, height=0.62, alpha=0.75)
        cells = [
            (cell[key] / scale, row)
            for row, arm in enumerate(arms)
            for cell in arm["cells"]
            if cell[key] is not None and not cell["problem"]
        ]
        dots(axes, cells, BLACK)
        axes.set_title(title)
        axes.set_xlabel(named)
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
    name_rows(grid[0, 0], [arm["name"] for arm in arms])
    caption = "Mean over seeds with scores; dots are single seeds. A stage that several arms share counts in each."
    return [Drawn("cost", figure, caption)]


def _scaled(most: float, key: str, unit: str) -> tuple[float, str]:
    """Choose a unit in which the largest value has few digits."""
    if key == "seconds":
        for factor, name in ((3600, "h"), (60, "min")):
            if most >= 3 * factor:
                return factor, name
        return 1, unit
    if key == "flops" and most >= 1e4:
        power = 3 * int(math.log10(most) // 3)
        names = {3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}
        return 10.0**power, f"{names.get(power, f'10^{power} ')}{unit}"
    return 1, unit
