"""Learning curves, and scores against what the study varied."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mirage_ds.analysis.inspect.style import GREY, WIDTH, Look, bars, dots, legible, look
from mirage_ds.study.report.figures import Drawn, handle, slug, spread
from mirage_ds.study.report.text import having, setting
from mirage_ds.study.results import Results, StageResult

Report = Mapping[str, Any]
# Steps and losses of a run, (n,) each.
Line = tuple[np.ndarray, np.ndarray]
# Values of a setting whose largest is so many times the smallest are drawn on a logarithmic axis.
_LOGARITHMIC = 8
# How the chain of stages is called among the settings.
_CHAIN = "stages"
# Numbers nearer to each other than this share of their range would write over each other.
_NEAREST = 0.06


def curves(results: Results, report: Report) -> list[Drawn]:
    """Draw loss against optimizer step, one panel a position in the chain, one colour an arm."""
    order = [arm["name"] for arm in report["arms"]]
    cells = sorted(results.cells, key=lambda one: order.index(one.arm))
    found: list[dict[str, list[Line]]] = []
    titles = []
    for position in range(max((len(cell.stages) for cell in cells), default=0)):
        runs: dict[str, list[Line]] = {}
        drawn: dict[str, str] = {}
        for cell in cells:
            for stage in cell.stages[position : position + 1]:
                line = _points(stage) if stage.key not in drawn else None
                if line is not None:
                    drawn[stage.key] = stage.name
                    runs.setdefault(cell.arm, []).append(line)
        if runs:
            names = ", ".join(dict.fromkeys(drawn.values()))
            found.append(runs)
            titles.append(legible(f"{position + 1}: {names} ({len(drawn)} run{'s' * (len(drawn) > 1)})", 60))
    if not found:
        return []
    arms = [name for name in order if any(name in runs for runs in found)]
    looks = {name: look(order.index(name)) for name in arms}
    handles = [
        handle(legible(name), colour, linestyle=dash, linewidth=1.8) for name, (colour, dash, _) in looks.items()
    ]
    figure, shown = spread(len(found), 2, 3.1, "Training loss", handles)
    for axes, runs, title in zip(shown, found, titles, strict=True):
        for name, lines in runs.items():
            _draw(axes, lines, looks[name])
        axes.set(title=title, xlabel="optimizer step", ylabel="training loss (mean over rows)")
        losses = np.concatenate([loss for lines in runs.values() for _, loss in lines])
        if losses.min() > 0 and losses.max() > _LOGARITHMIC * losses.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid()
    caption = (
        "Loss of each stage of the chains. Thin: single seeds; thick: their mean where they logged the same steps. A "
        "stage that several arms share is drawn once, for the first of them."
    )
    return [Drawn("curves", figure, caption)]


def _points(stage: StageResult) -> Line | None:
    """Return steps and losses where both are finite; None where there is none."""
    pairs = [(one.get("step", math.nan), one.get("loss", math.nan)) for one in stage.curve]
    known = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if not known:
        return None
    steps, losses = np.asarray(sorted(known), dtype=np.float64).T
    return steps, losses


def _draw(axes: Axes, lines: Sequence[Line], how: Look) -> None:
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
        alike = _alike(name, arms)
        seen.update(alike)
        varied = [arm for arm in arms if not isinstance(arm["settings"].get(name, []), (list, dict))]
        one = _sweep(name, alike, varied)
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


class Scale(NamedTuple):
    """Where a setting's values stand on an axis.

    Attributes:
        places: value as JSON → place; labels: place → label.
        kind: "linear", "logarithmic", "even" for numbers that would crowd each other on either, or "words".
    """

    places: dict[str, float]
    labels: dict[float, str]
    kind: str

    def at(self, value: Any, aside: float) -> float:
        """Place a value, so many hundredths of the axis aside: intervals of the same value must not hide each other."""
        first, last = min(self.places.values()), max(self.places.values())
        place = self.places[_same(value)]
        if self.kind == "logarithmic":
            return place * (last / first) ** (0.01 * aside)
        return place + 0.01 * (last - first) * aside


def _scale(values: Sequence[Any]) -> Scale:
    known = {_same(value): value for value in values}
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in known.values()):
        words = {key: float(at) for at, key in enumerate(known)}
        return Scale(words, {place: setting(known[key]) for key, place in words.items()}, "words")
    numbers = sorted({float(one) for one in known.values()})
    kind, spots, on = "linear", numbers, np.asarray(numbers)
    if numbers[0] > 0 and numbers[-1] >= _LOGARITHMIC * numbers[0]:
        kind, on = "logarithmic", np.log(numbers)
    if len(numbers) > 1 and np.diff(on).min() < _NEAREST * (on[-1] - on[0]):
        kind, spots = "even", [float(at) for at in range(len(numbers))]
    place = dict(zip(numbers, spots, strict=True))
    return Scale(
        {key: place[float(one)] for key, one in known.items()}, {spot: f"{one:g}" for one, spot in place.items()}, kind
    )


def _sweep(name: str, alike: Sequence[str], arms: Sequence[Mapping[str, Any]]) -> Drawn | None:
    """Draw one setting, or several that are alike; None where no two arms differ in them alone."""
    same: dict[str, list[Mapping[str, Any]]] = {}
    for arm in arms:
        rest = {key: value for key, value in _traits(arm).items() if key not in alike}
        same.setdefault(_same(rest), []).append(arm)
    lines = [group for group in same.values() if len({_same(arm["settings"][name]) for arm in group}) > 1]
    if not lines:
        return None
    scale = _scale([arm["settings"][name] for arm in arms])
    groups = [(group, at - (len(lines) - 1) / 2, look(at)) for at, group in enumerate(lines)]
    handles = [
        handle(label, colour, linestyle=dash, marker=mark)
        for label, (_, _, (colour, dash, mark)) in zip(_labels(alike, lines), groups, strict=True)
    ]
    # Beside the lines, those with the same value beside each other.
    before: Counter[str] = Counter()
    for arm in (arm for group in same.values() if group not in lines for arm in group):
        value = _same(arm["settings"][name])
        groups.append(([arm], len(lines) / 2 + 1 + 1.6 * before[value], (GREY, "", "D")))
        before[value] += 1
    if before:
        handles.append(handle("differs in other settings too", GREY, marker="D", linestyle=""))
    title = legible(" = ".join(alike), 80)
    evaluations = list(dict.fromkeys(key for arm in arms for key in arm["evaluations"]))
    width = WIDTH if len(evaluations) > 1 else 7.0
    figure, shown = spread(len(evaluations), 2, 3.2, f"Scores against {title}", handles, width)
    for axes, evaluation in zip(shown, evaluations, strict=True):
        for group, aside, how in groups:
            points = [
                (scale.at(arm["settings"][name], aside), arm["evaluations"][evaluation])
                for arm in having(evaluation, group)
            ]
            _line(axes, sorted(points, key=lambda one: one[0]), how)
        if scale.kind == "logarithmic":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.minorticks_off()
        axes.set_xticks(list(scale.labels), [legible(text, 18) for text in scale.labels.values()])
        metric = having(evaluation, arms)[0]["evaluations"][evaluation]["metric"]
        note = " (not to scale)" if scale.kind == "even" else ""
        axes.set(title=legible(evaluation), xlabel=f"{title}{note}", ylabel=f"{legible(metric)}, mean")
        axes.grid()
    caption = (
        f"Scores against {' = '.join(alike)}, with 95 % intervals over seeds and records; small dots are single seeds. "
        "A line joins arms that differ in nothing else. Points of the same value stand a little aside of each other."
    )
    return Drawn(slug("setting", name), figure, caption)


def _line(axes: Axes, points: Sequence[tuple[float, Mapping[str, Any]]], how: Look) -> None:
    """Draw one group of arms, from left to right."""
    if not points:
        return
    colour, dash, mark = how
    places = [place for place, _ in points]
    means = [found["overall"]["mean"] for _, found in points]
    sides = np.asarray([bars(found["overall"]) for _, found in points]).T
    shape = {"linestyle": dash, "marker": mark, "markersize": 5, "capsize": 2.5, "linewidth": 1.4}
    axes.errorbar(places, means, yerr=sides, color=colour, **shape)
    dots(axes, [(place, seed["score"]) for place, found in points for seed in found["by_seed"]])


def _labels(names: Sequence[str], lines: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Name the lines by the settings and stages that tell them apart."""
    traits = [_traits(group[0]) for group in lines]
    keys = dict.fromkeys(key for one in traits for key in one if key not in names)
    differ = [key for key in keys if len({_same(one.get(key)) for one in traits}) > 1]
    if not differ:
        return ["arms that differ in nothing else"]
    return [legible(", ".join(f"{key} {setting(one[key])}" for key in differ if key in one), 60) for one in traits]
