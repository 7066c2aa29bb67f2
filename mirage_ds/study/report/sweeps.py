"""Learning curves, and scores against what the study varied."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mirage_ds.analysis.inspect.style import GREY, WIDTH, Look, bars, dots, legend, legible, look, panels, room
from mirage_ds.study.report.figures import Drawn, slug
from mirage_ds.study.report.tables import setting
from mirage_ds.study.results import Results, StageResult

Report = Mapping[str, Any]
# Values of a setting whose largest is so many times the smallest are drawn on a logarithmic axis.
_LOGARITHMIC = 8
# How the chain of stages is called among the settings.
_CHAIN = "stages"
# Numbers nearer to each other than this share of their range would write over each other.
_NEAREST = 0.06


def curves(results: Results, report: Report) -> list[Drawn]:
    """Draw loss against optimizer step, one panel a position in the chain, one colour an arm."""
    order = [arm["name"] for arm in report["arms"]]
    longest = max((len(cell.stages) for cell in results.cells), default=0)
    found: list[dict[str, list[tuple[np.ndarray, np.ndarray]]]] = []
    titles = []
    for position in range(longest):
        runs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        keys: set[str] = set()
        names: dict[str, None] = {}
        for cell in sorted(results.cells, key=lambda one: order.index(one.arm)):
            stage = cell.stages[position] if position < len(cell.stages) else None
            line = _points(stage) if stage is not None and stage.key not in keys else None
            if stage is not None and line is not None:
                keys.add(stage.key)
                names[stage.name] = None
                runs.setdefault(cell.arm, []).append(line)
        if runs:
            found.append(runs)
            titles.append(legible(f"{position + 1}: {', '.join(names)} ({len(keys)} run{'s' * (len(keys) > 1)})", 60))
    if not found:
        return []
    arms = [name for name in order if any(name in runs for runs in found)]
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, label=legible(name))
        for name in arms
        for colour, dash, _ in [look(order.index(name))]
    ]
    across = min(2, len(found))
    down = -(-len(found) // across)
    beside = room([str(one.get_label()) for one in handles])
    figure, grid = panels(down, across, 3.1, title="Training loss", beside=beside)
    for number, axes in enumerate(grid.flat):
        if number >= len(found):
            axes.set_visible(False)
            continue
        for name, lines in found[number].items():
            _draw(axes, lines, look(order.index(name)))
        axes.set_title(titles[number])
        axes.set(xlabel="optimizer step", ylabel="training loss (mean over rows)")
        losses = np.concatenate([loss for lines in found[number].values() for _, loss in lines])
        if losses.min() > 0 and losses.max() > _LOGARITHMIC * losses.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid()
    legend(figure, handles)
    caption = (
        "Loss of each stage of the chains. Thin: single seeds; thick: their mean where they logged the same steps. A "
        "stage that several arms share is drawn once, for the first of them."
    )
    return [Drawn("curves", figure, caption)]


def _points(stage: StageResult) -> tuple[np.ndarray, np.ndarray] | None:
    """Return steps and losses where both are finite; None where there is none."""
    pairs = [(one.get("step"), one.get("loss")) for one in stage.curve]
    known = [(x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]
    if not known:
        return None
    steps, losses = np.asarray(sorted(known), dtype=np.float64).T
    return steps, losses


def _draw(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], how: Look) -> None:
    colour, dash, mark = how
    # A single point has no line.
    dot = mark if all(len(steps) == 1 for steps, _ in lines) else ""
    if len(lines) > 1:
        for steps, losses in lines:
            axes.plot(steps, losses, color=colour, linestyle=dash, linewidth=0.5, alpha=0.3, marker=dot)
    if all(np.array_equal(steps, lines[0][0]) for steps, _ in lines):
        mean = np.mean([losses for _, losses in lines], axis=0)
        axes.plot(lines[0][0], mean, color=colour, linestyle=dash, linewidth=1.8, marker=dot, markersize=4, zorder=3)


def sweeps(report: Report) -> list[Drawn]:
    """Draw the scores against each setting that takes several values, lines where all other settings are equal."""
    drawn = []
    arms = [arm for arm in report["arms"] if arm["evaluations"]]
    seen: set[str] = set()
    for name in dict.fromkeys(key for arm in arms for key in arm["settings"]):
        if name in seen:
            continue
        seen.update(_alike(name, arms))
        having = [
            arm for arm in arms if name in arm["settings"] and not isinstance(arm["settings"][name], (list, dict))
        ]
        if len({_same(arm["settings"][name]) for arm in having}) > 1:
            one = _sweep(name, _alike(name, arms), having)
            drawn.extend([one] if one is not None else [])
    return drawn


def _same(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _alike(name: str, arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings that have this one's value in every arm: k of two stages that vary together are one axis."""
    values = [_same(arm["settings"].get(name)) for arm in arms]
    keys = dict.fromkeys(key for arm in arms for key in arm["settings"])
    return [key for key in keys if [_same(arm["settings"].get(key)) for arm in arms] == values]


def _traits(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells an arm from others: its settings and its chain of stages."""
    # A cell that is not done has the first of its stages alone.
    chains = [" → ".join(stage["name"] for stage in cell["stages"]) for cell in arm["cells"]]
    return {**arm["settings"], _CHAIN: max(chains, key=len, default="")}


def _groups(names: Sequence[str], arms: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Gather the arms that differ in nothing but these settings."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for arm in arms:
        rest = {key: value for key, value in sorted(_traits(arm).items()) if key not in names}
        groups.setdefault(_same(rest), []).append(arm)
    return groups


def _sweep(name: str, alike: Sequence[str], arms: Sequence[Mapping[str, Any]]) -> Drawn | None:
    """Draw one setting, or several that are alike; None where no two arms differ in them alone."""
    title = " = ".join(alike)
    groups = list(_groups(alike, arms).values())
    lines = [group for group in groups if len({_same(arm["settings"][name]) for arm in group}) > 1]
    alone = [arm for group in groups if group not in lines for arm in group]
    if not lines:
        return None
    places, ticks, kind = _axis([arm["settings"][name] for arm in arms])
    evaluations = list(dict.fromkeys(key for arm in arms for key in arm["evaluations"]))
    handles = [
        Line2D([], [], color=colour, linestyle=dash, marker=mark, markersize=5, label=label)
        for label, (colour, dash, mark) in zip(_labels(alike, lines), map(look, range(len(lines))), strict=True)
    ]
    if alone:
        handles.append(
            Line2D([], [], color=GREY, marker="D", markersize=5, linestyle="", label="differs in other settings too")
        )
    across = min(2, len(evaluations))
    down = -(-len(evaluations) // across)
    width = WIDTH if across > 1 else 7.0
    beside = room([str(one.get_label()) for one in handles], width)
    figure, grid = panels(down, across, 3.2, width=width, title=f"Scores against {legible(title, 80)}", beside=beside)
    for number, axes in enumerate(grid.flat):
        if number >= len(evaluations):
            axes.set_visible(False)
            continue
        evaluation = evaluations[number]
        for at, group in enumerate(lines):
            _line(axes, group, evaluation, name, places, look(at), (at - (len(lines) - 1) / 2, kind))
        for at, arm in enumerate(alone):
            # Beside the lines, those with the same value beside each other.
            before = sum(_same(one["settings"][name]) == _same(arm["settings"][name]) for one in alone[:at])
            _line(axes, [arm], evaluation, name, places, (GREY, "", "D"), (len(lines) / 2 + 1 + 1.6 * before, kind))
        metric = next(arm["evaluations"][evaluation]["metric"] for arm in arms if evaluation in arm["evaluations"])
        if kind == "logarithmic":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.minorticks_off()
        axes.set_xticks(list(ticks), [legible(text, 18) for text in ticks.values()])
        note = " (not to scale)" if kind == "even" else ""
        axes.set(xlabel=f"{legible(title, 80)}{note}", ylabel=f"{legible(metric)}, mean")
        axes.set_title(legible(evaluation))
        axes.grid()
    legend(figure, handles, width)
    caption = (
        f"Scores against {title}, with 95 % intervals over seeds and records; small dots are single seeds. A line "
        "joins arms that differ in nothing else. Points of the same value stand a little aside of each other."
    )
    return Drawn(slug("setting", name), figure, caption)


def _line(
    axes: Axes,
    arms: Sequence[Mapping[str, Any]],
    evaluation: str,
    name: str,
    places: Mapping[str, float],
    how: Look,
    aside: tuple[float, str],
) -> None:
    """Draw one group of arms, its points a little aside so that the groups' intervals do not hide each other."""
    colour, dash, mark = how
    number, kind = aside
    first, last = min(places.values()), max(places.values())
    points = []
    for arm in arms:
        found = arm["evaluations"].get(evaluation)
        if found is not None:
            x = places[_same(arm["settings"][name])]
            # One step aside is a hundredth of the axis.
            x = x * (last / first) ** (0.01 * number) if kind == "logarithmic" else x + 0.01 * (last - first) * number
            points.append((x, found))
    points.sort(key=lambda one: one[0])
    if not points:
        return
    means = [found["overall"]["mean"] for _, found in points]
    sides = np.asarray([bars(found["overall"]) for _, found in points]).T
    axes.errorbar(
        [x for x, _ in points],
        means,
        yerr=sides,
        color=colour,
        linestyle=dash,
        marker=mark,
        markersize=5,
        capsize=2.5,
        linewidth=1.4,
    )
    dots(axes, [(x, seed["score"]) for x, found in points for seed in found["by_seed"]])


def _axis(values: Sequence[Any]) -> tuple[dict[str, float], dict[float, str], str]:
    """Place a setting's values on an axis.

    Returns:
        (value as JSON → place, place → label, "linear", "logarithmic", "even" for numbers that would crowd each other
        on either, or "words")
    """
    known = {_same(value): value for value in values}
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in known.values()):
        places = {key: float(at) for at, key in enumerate(known)}
        return places, {place: setting(known[key]) for key, place in places.items()}, "words"
    numbers = sorted({float(one) for one in known.values()})
    labels = [f"{one:g}" for one in numbers]
    if numbers[0] > 0 and numbers[-1] >= _LOGARITHMIC * numbers[0]:
        kind, spots, on = "logarithmic", numbers, np.log(numbers)
    else:
        kind, spots, on = "linear", numbers, np.asarray(numbers)
    if len(numbers) > 1 and np.diff(on).min() < _NEAREST * (on[-1] - on[0]):
        kind, spots = "even", [float(at) for at in range(len(numbers))]
    place = dict(zip(numbers, spots, strict=True))
    return {key: place[float(one)] for key, one in known.items()}, dict(zip(spots, labels, strict=True)), kind


def _labels(names: Sequence[str], lines: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Name the lines by the settings and stages that tell them apart."""
    traits = [_traits(group[0]) for group in lines]
    keys = dict.fromkeys(key for one in traits for key in one if key not in names)
    differ = [key for key in keys if len({_same(one.get(key)) for one in traits}) > 1]
    if not differ:
        return ["arms that differ in nothing else"]
    return [legible(", ".join(f"{key} {setting(one[key])}" for key in differ if key in one), 60) for one in traits]
