"""The report's dict → figures of scores, contrasts, controls and cost. What has nothing to show gives no figure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.inspect import style
from mirage_ds.study.report.text import evaluations, having, judged

Report = Mapping[str, Any]


class Drawn(NamedTuple):
    """A figure, the stem of its file's name, and how to read it."""

    name: str
    figure: Figure
    caption: str


def slug(*texts: str) -> str:
    """Return texts as a file's name without odd characters."""
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "x" for text in texts)[:80]


def handle(label: str, colour: str, **how: Any) -> Line2D:
    """Make a line of the legend."""
    return Line2D([], [], color=colour, label=label, **{"markersize": 5, **how})


def spread(
    count: int,
    most: int,
    height: float,
    title: str,
    handles: Sequence[Line2D],
    width: float = style.WIDTH,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels, at most so many beside each other, with a legend below them.

    Args:
        height: of a panel with its labels, in inches.
    """
    across = min(most, count)
    beside = style.room([str(one.get_label()) for one in handles], width)
    figure, grid = style.panels(-(-count // across), across, height, width=width, title=title, beside=beside, **options)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    style.legend(figure, handles, width)
    return figure, list(grid.flat[:count])


def scores(report: Report) -> list[Drawn]:
    """Draw each evaluation's scores, an arm a row, overall and level by level."""
    drawn = []
    for evaluation, levels in evaluations(report).items():
        arms = {arm["name"]: arm["evaluations"][evaluation] for arm in having(evaluation, report["arms"])}
        metric = next(iter(arms.values()))["metric"]
        handles = [
            handle("mean, 95 % interval", style.BLUE, marker="o"),
            handle("one seed", style.GREY, marker="o", markersize=3, linestyle=""),
        ]
        primary = report["primary"]
        base = None
        if primary and not primary["problem"] and primary["evaluation"] == evaluation:
            base = primary["base"]
            handles.append(handle(f"mean of {style.legible(base)}", style.BLACK, linestyle="--", linewidth=1))
        # One level is the same as all.
        parts: list[str | None] = [None, *(levels if len(levels) > 1 else [])]
        title, height = f"{evaluation}: {metric}", style.ROW * len(arms) + 0.75
        figure, shown = spread(len(parts), 3, height, title, handles, sharex=True, sharey=True)
        for number, (axes, level) in enumerate(zip(shown, parts, strict=True)):
            _score_panel(axes, arms, level, base)
            # Where the row below has no panel in this column, the axis is named here.
            lowest = number + 3 >= len(parts)
            axes.tick_params(labelbottom=lowest)
            axes.set_xlabel(f"{style.legible(metric)}, mean" if lowest else "")
            axes.tick_params(axis="y", length=0)
        style.name_rows(shown[0], list(arms))
        caption = (
            f"Evaluation {evaluation}: mean {metric} of each arm with its 95 % interval over seeds and records; small "
            "dots are single seeds."
        )
        drawn.append(Drawn(slug("scores", evaluation), figure, caption))
    return drawn


def _score_panel(axes: Axes, arms: Mapping[str, Mapping[str, Any]], level: str | None, base: str | None) -> None:
    for row, (name, found) in enumerate(arms.items()):
        one = found["overall"] if level is None else found["levels"].get(level)
        if one is not None:
            style.interval(axes, row, one, style.BLUE)
            if name == base:
                axes.axvline(one["mean"], color=style.BLACK, linestyle="--", linewidth=1, zorder=1)
        by_seed = [seed if level is None else seed["levels"].get(level) for seed in found["by_seed"]]
        style.dots(axes, [(seed["score"], row + 0.24) for seed in by_seed if seed is not None])
    axes.set_title("all records" if level is None else f"level {style.legible(level)}")
    axes.grid(axis="x")


def contrasts(report: Report) -> list[Drawn]:
    """Draw the contrasts as a forest, with the margin as a band."""
    margin, first = report["margin"], report["primary"]
    found = [one for one in (first, *report["contrasts"]) if one is not None and not one["problem"]]
    if not found:
        return []
    handles = [
        handle("primary, 95 % interval", style.VERMILLION, marker="o"),
        handle("other, 95 % interval", style.BLUE, marker="o"),
        handle("90 % interval", style.BLACK, linewidth=4, alpha=0.35),
        handle("one seed", style.GREY, marker="o", markersize=3, linestyle=""),
        handle(f"± {margin:g}", style.GREEN, linewidth=8, alpha=0.2),
    ]
    handles = handles if found[0] is first else handles[1:]
    figure, (axes,) = spread(1, 1, 0.36 * len(found) + 0.75, "Differences between arms", handles)
    axes.axvspan(-margin, margin, color=style.GREEN, alpha=0.15, linewidth=0)
    axes.axvline(0, color=style.BLACK, linewidth=1)
    for row, one in enumerate(found):
        colour = style.VERMILLION if one is first else style.BLUE
        apart = one["difference"]
        axes.plot([apart["low90"], apart["high90"]], [row, row], color=colour, linewidth=5, alpha=0.35)
        style.interval(axes, row, apart, colour)
        style.dots(axes, [(seed["difference"], row + 0.25) for seed in one["by_seed"]])
    style.name_rows(axes, [_pair(one, found) for one in found], 70)
    words = axes.secondary_yaxis("right")
    words.set_yticks(range(len(found)), [judged(one, margin).replace(", and", ",\nand") for one in found])
    words.tick_params(length=0)
    words.spines["right"].set_visible(False)
    metrics = dict.fromkeys(style.legible(one["metric"]) for one in found)
    axes.set_xlabel(f"difference in {', '.join(metrics)} (arm − base)")
    axes.grid(axis="x")
    caption = (
        f"Arm − base, paired by seed and record. Green: within ± {margin:g}. A 90 % interval inside it means "
        "equivalent; a 95 % interval without 0 means higher or lower, if the test agrees."
    )
    return [Drawn("contrasts", figure, caption)]


def _pair(contrast: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """Name a contrast, with its evaluation and levels where the others have other ones."""
    text = f"{style.legible(contrast['arm'], 24)} − {style.legible(contrast['base'], 24)}"
    if len({one["evaluation"] for one in among}) > 1:
        text += f", {style.legible(contrast['evaluation'], 14)}"
    if len({tuple(one["levels"]) for one in among}) > 1:
        text += f", level {', '.join(contrast['levels'])}" if contrast["levels"] else ", all levels"
    return text


def controls(report: Report) -> list[Drawn]:
    """Draw the scores under each condition, and which path the answers follow, one figure each an evaluation."""
    drawn = []
    for evaluation in dict.fromkeys(entry["evaluation"] for entry in report["controls"]):
        entries = [entry for entry in report["controls"] if entry["evaluation"] == evaluation]
        scored = [entry for entry in entries if entry["conditions"]]
        if scored:
            caption = (
                "Scores with other latents fed at the slots; own are the model's. 95 % intervals over seeds and "
                "records. Compare with the paired differences in the table, whose intervals are narrower."
            )
            drawn.append(Drawn(slug("controls", evaluation), _conditions(scored, report), caption))
        followed = [entry for entry in entries if entry["path"]]
        if followed:
            caption = (
                "The latents of one of two shortest paths were fed. Left: what share of the answers is that path, the "
                "other, or neither. Right: injected − other, which is 0 where answers do not depend on the latents. "
                "95 % intervals."
            )
            drawn.append(Drawn(slug("follow", evaluation), _paths(followed), caption))
    return drawn


def _conditions(entries: Sequence[Mapping[str, Any]], report: Report) -> Figure:
    names = list(dict.fromkeys(name for entry in entries for name in entry["conditions"]))
    order = [arm["name"] for arm in report["arms"]]
    looks = [style.look(order.index(entry["arm"])) for entry in entries]
    handles = [
        handle(style.legible(entry["arm"]), colour, marker=mark, linestyle="")
        for entry, (colour, _, mark) in zip(entries, looks, strict=True)
    ]
    step = min(0.16, 0.8 / len(entries))
    title = f"{entries[0]['evaluation']}: {entries[0]['metric']} with other latents"
    height = len(names) * max(0.3, 0.13 * len(entries) + 0.12) + 0.6
    figure, (axes,) = spread(1, 1, height, title, handles)
    for number, (entry, (colour, _, mark)) in enumerate(zip(entries, looks, strict=True)):
        for row, name in enumerate(names):
            if name in entry["conditions"]:
                at = row + step * (number - (len(entries) - 1) / 2)
                style.interval(axes, at, entry["conditions"][name], colour, mark)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color=style.GREY, linewidth=0.5, alpha=0.5)
    style.name_rows(axes, names)
    axes.set(xlabel=f"{style.legible(entries[0]['metric'])}, mean", ylabel="latents fed")
    axes.grid(axis="x")
    return figure


def _paths(entries: Sequence[Mapping[str, Any]]) -> Figure:
    looks = dict(zip(VERDICTS, ((style.VERMILLION, "o"), (style.BLUE, "s"), (style.GREY, "^")), strict=True))
    handles = [handle(f"follows {kind}", colour, marker=mark, linestyle="") for kind, (colour, mark) in looks.items()]
    title = f"{entries[0]['evaluation']}: which path's latents the answer follows"
    figure, (shares, apart) = spread(2, 2, 0.42 * len(entries) + 0.75, title, handles, sharey=True)
    for row, entry in enumerate(entries):
        for number, (kind, (colour, mark)) in enumerate(looks.items()):
            style.interval(shares, row + 0.2 * (number - 1), entry["path"][kind], colour, mark)
        style.interval(apart, row, entry["path"]["difference"], style.BLACK)
    apart.axvline(0, color=style.BLACK, linewidth=1)
    style.name_rows(shares, [entry["arm"] for entry in entries])
    shares.set(xlabel="share of answers", xlim=(-0.02, 1.02))
    apart.set(xlabel="share that follows the injected path − the other")
    for axes in (shares, apart):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    return figure


# Key of a cost, its title, its unit, its colour.
_COSTS = (
    ("seconds", "time of all steps", "s", style.BLUE),
    ("samples_s", "speed", "samples/s", style.GREEN),
    ("flops", "model FLOPs", "FLOP", style.ORANGE),
    ("peak_gb", "peak memory of a rank", "GB", style.VERMILLION),
)


def cost(report: Report) -> list[Drawn]:
    """Draw what a chain of each arm cost."""
    arms = [arm for arm in report["arms"] if any(arm["cost"][key] for key, *_ in _COSTS)]
    parts = [part for part in _COSTS if any(arm["cost"][part[0]] for arm in arms)]
    if not parts:
        return []
    longest = max(len(style.legible(arm["name"], 30)) for arm in arms)
    width = min(style.WIDTH, style.LETTER * longest + 2.3 * len(parts) + 0.4)
    height = style.ROW * len(arms) + 0.75
    figure, shown = spread(len(parts), len(parts), height, "Cost of a chain", [], width, sharey=True)
    for axes, (key, title, unit, colour) in zip(shown, parts, strict=True):
        means = [arm["cost"][key] for arm in arms]
        scale, named = _scaled(max(one for one in means if one is not None), key, unit)
        axes.barh(range(len(arms)), [(one or 0) / scale for one in means], color=colour, height=0.62, alpha=0.75)
        for row, arm in enumerate(arms):
            cells = [cell[key] / scale for cell in arm["cells"] if cell[key] is not None and not cell["problem"]]
            style.dots(axes, [(one, row) for one in cells], style.BLACK)
        axes.set_title(title)
        axes.set_xlabel(named)
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
    style.name_rows(shown[0], [arm["name"] for arm in arms])
    caption = "Mean over seeds with scores; dots are single seeds. A stage that several arms share counts in each."
    return [Drawn("cost", figure, caption)]


def _scaled(most: float, key: str, unit: str) -> tuple[float, str]:
    """Choose a unit in which the largest value has few digits."""
    if key == "seconds":
        for factor, name in ((3600, "h"), (60, "min")):
            if most >= 3 * factor:
                return factor, name
    if key == "flops" and most >= 1e4:
        power = 3 * int(math.log10(most) // 3)
        names = {3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}
        return 10.0**power, f"{names.get(power, f'10^{power} ')}{unit}"
    return 1, unit
