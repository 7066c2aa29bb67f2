"""The report's dict → figures of scores, contrasts and controls. What has nothing to show gives no figure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.inspect import style
from mirage_ds.study.report.text import evaluations, having, judged, label, pair

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


def _rows(
    axes: Axes, names: Sequence[str], series: Sequence[tuple[str, str, Sequence[Any]]], step: float = 0.0
) -> None:
    """Draw intervals in named rows.

    Args:
        series: colour, marker, and an Estimate or None a row; each series stands so much of a row below the one before.
    """
    for number, (colour, mark, found) in enumerate(series):
        for row, one in enumerate(found):
            if one is not None:
                style.interval(axes, row + step * (number - (len(series) - 1) / 2), one, colour, mark)
    style.name_rows(axes, names, 70)
    axes.grid(axis="x")


def lead(report: Report) -> Drawn:
    """Draw what stands first: the primary evaluation's scores over all records, or the first one's."""
    evaluation = next(iter(evaluations(report)))
    arms, handles, base = _scored(report, evaluation)
    chance = report["chance"].get(evaluation)
    title = f"{evaluation}: {next(iter(arms.values()))['metric']}"
    figure, (axes,) = spread(1, 1, style.ROW * len(arms) + 0.75, title, handles, 7.0)
    _score_panel(axes, arms, None, base, chance)
    axes.set(title="", xlabel=f"mean over all records of {evaluation}")
    means = axes.secondary_yaxis("right")
    means.set_yticks(range(len(arms)), [f"{found['overall']['mean']:.3f}" for found in arms.values()])
    means.tick_params(length=0)
    means.spines["right"].set_visible(False)
    caption = "Scores of the arms with their 95 % intervals over seeds and records; small dots are single seeds."
    if chance:
        caption += f" Dotted: what the best constant answer gets, {chance['overall']:.3f}."
    return Drawn("lead", figure, caption)


def _scored(report: Report, evaluation: str) -> tuple[dict[str, Any], list[Line2D], str | None]:
    """Return an evaluation's scores by arm, the legend, and the primary contrast's base if it is of this evaluation."""
    arms = {arm["name"]: arm["evaluations"][evaluation] for arm in having(evaluation, report["arms"])}
    handles = [
        handle("mean, 95 % interval", style.BLUE, marker="o"),
        handle("one seed", style.GREY, marker="o", markersize=3, linestyle=""),
    ]
    primary = report["primary"]
    base = None
    if primary and not primary["problem"] and primary["evaluation"] == evaluation:
        base = primary["base"]
        handles.append(handle(f"mean of {style.legible(label(base))}", style.BLACK, linestyle="--", linewidth=1))
    if evaluation in report["chance"]:
        handles.append(handle("best constant answer", style.VERMILLION, linestyle=":", linewidth=1.4))
    return arms, handles, base


def scores(report: Report) -> list[Drawn]:
    """Draw the scores of each evaluation, an arm a row, overall and level by level; not again what `lead` shows."""
    drawn = []
    for number, (evaluation, levels) in enumerate(evaluations(report).items()):
        if number == 0 and len(levels) < 2:
            continue
        arms, handles, base = _scored(report, evaluation)
        metric = next(iter(arms.values()))["metric"]
        # One level is the same as all.
        parts: list[str | None] = [None, *(levels if len(levels) > 1 else [])]
        title, height = f"{evaluation}: {metric}", style.ROW * len(arms) + 0.75
        figure, shown = spread(len(parts), 3, height, title, handles, sharex=True, sharey=True)
        for axes, level in zip(shown, parts, strict=True):
            _score_panel(axes, arms, level, base, report["chance"].get(evaluation))
            axes.set_xlabel(f"{style.legible(metric)}, mean")
            axes.tick_params(labelbottom=True)
        caption = (
            f"Evaluation {evaluation}: mean {metric} of each arm with its 95 % interval over seeds and records; small "
            "dots are single seeds."
        )
        drawn.append(Drawn(slug("scores", evaluation), figure, caption))
    return drawn


def _score_panel(axes: Axes, arms: Mapping[str, Any], level: str | None, base: str | None, chance: Any) -> None:
    def at_level(found: Mapping[str, Any], whole: Mapping[str, Any]) -> Any:
        return whole if level is None else found["levels"].get(level)

    means = {name: at_level(found, found["overall"]) for name, found in arms.items()}
    _rows(axes, [style.legible(label(name), 30) for name in means], [(style.BLUE, "o", list(means.values()))])
    if base is not None and means[base] is not None:
        axes.axvline(means[base]["mean"], color=style.BLACK, linestyle="--", linewidth=1, zorder=1)
    if chance is not None and (value := at_level(chance, chance["overall"])) is not None:
        axes.axvline(value, color=style.VERMILLION, linestyle=":", linewidth=1.4, zorder=1)
    for row, found in enumerate(arms.values()):
        by_seed = [at_level(seed, seed) for seed in found["by_seed"]]
        style.dots(axes, [(seed["score"], row + 0.24) for seed in by_seed if seed is not None])
    axes.set_title("all records" if level is None else f"level {style.legible(level)}")


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
    style.name_rows(axes, [pair(one) for one in found], 70)
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
    pairs = list(zip(entries, looks, strict=True))
    handles = [
        handle(style.legible(label(one["arm"])), colour, marker=mark, linestyle="") for one, (colour, _, mark) in pairs
    ]
    title = f"{entries[0]['evaluation']}: {entries[0]['metric']} with other latents"
    height = len(names) * max(0.3, 0.13 * len(entries) + 0.12) + 0.6
    figure, (axes,) = spread(1, 1, height, title, handles)
    series = [(colour, mark, [one["conditions"].get(name) for name in names]) for one, (colour, _, mark) in pairs]
    _rows(axes, names, series, min(0.16, 0.8 / len(entries)))
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color=style.GREY, linewidth=0.5, alpha=0.5)
    axes.set(xlabel=f"{style.legible(entries[0]['metric'])}, mean", ylabel="latents fed")
    return figure


def _paths(entries: Sequence[Mapping[str, Any]]) -> Figure:
    looks = dict(zip(VERDICTS, ((style.VERMILLION, "o"), (style.BLUE, "s"), (style.GREY, "^")), strict=True))
    handles = [handle(f"follows {kind}", colour, marker=mark, linestyle="") for kind, (colour, mark) in looks.items()]
    title = f"{entries[0]['evaluation']}: which path's latents the answer follows"
    figure, (shares, apart) = spread(2, 2, 0.42 * len(entries) + 0.75, title, handles, sharey=True)
    arms = [style.legible(label(entry["arm"]), 30) for entry in entries]
    series = [(*how, [entry["path"][kind] for entry in entries]) for kind, how in looks.items()]
    _rows(shares, arms, series, 0.2)
    _rows(apart, arms, [(style.BLACK, "o", [entry["path"]["difference"] for entry in entries])])
    apart.axvline(0, color=style.BLACK, linewidth=1)
    shares.set(xlabel="share of answers", xlim=(-0.02, 1.02))
    apart.set(xlabel="share that follows the injected path − the other")
    return figure
