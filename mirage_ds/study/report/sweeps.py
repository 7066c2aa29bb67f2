"""Learning curves, and scores against what the study varied."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from mirage_ds.analysis.inspect.style import GREY, WIDTH, Look, bars, dots, legible, look
from mirage_ds.study.report.figures import Drawn, handle, slug, spread
from mirage_ds.study.report.text import having, label, setting
from mirage_ds.study.results import Results

Report = Mapping[str, Any]
# Steps and losses of a run, (n,) each.
Line = tuple[np.ndarray, np.ndarray]
# Losses whose largest is so many times the smallest are drawn on a logarithmic axis.
_LOGARITHMIC = 8
# How the chain of stages is called among the settings.
_CHAIN = "stages"
# Instead of a value that an arm has not; no setting's text. Not NUL, which numpy cuts off on pandas' way to fill it in.
_UNSET = "\x1f"
# Values stand 1 apart; groups of arms stand so far aside of each other, all of them at most so far.
_ASIDE, _MOST_ASIDE = 0.06, 0.6


def curves(results: Results, report: Report) -> list[Drawn]:
    """Draw loss against optimizer step, one colour an arm, one panel a position in the chain and kind of loss.

    Losses of other stages, or with other weights, are of other scales.
    """
    order = [arm["name"] for arm in report["arms"]]
    cells = sorted(results.cells, key=lambda one: order.index(one.arm))
    panels: dict[str, dict[str, list[Line]]] = {}
    for position in range(max(len(cell.stages) for cell in cells)):
        kinds: dict[str, dict[str, list[Line]]] = {}
        drawn: dict[str, dict[str, str]] = {}
        for cell in cells:
            weights = "".join(f", {key} {value}" for key, value in cell.settings.items() if key.endswith("_weight"))
            for stage in cell.stages[position : position + 1]:
                points = [(one["step"], one["loss"]) for one in stage.curve if "loss" in one]
                kind = f"{stage.stage}{weights}"
                if points and stage.key not in drawn.setdefault(kind, {}):
                    drawn[kind][stage.key] = stage.name
                    steps, losses = np.asarray(points, dtype=np.float64).T
                    kinds.setdefault(kind, {}).setdefault(cell.arm, []).append((steps, losses))
        for kind, own in kinds.items():
            names, count = ", ".join(dict.fromkeys(drawn[kind].values())), len(drawn[kind])
            panels[legible(f"{position + 1}, {kind}: {names} ({count} run{'s' * (count > 1)})", 60)] = own
    if not panels:
        return []
    looks = {name: look(at) for at, name in enumerate(order) if any(name in runs for runs in panels.values())}
    handles = [
        handle(legible(label(name)), colour, linestyle=dash, linewidth=1.8) for name, (colour, dash, _) in looks.items()
    ]
    figure, shown = spread(len(panels), 2, 3.1, "Training loss", handles)
    for axes, (title, runs) in zip(shown, panels.items(), strict=True):
        for name, lines in runs.items():
            _draw(axes, lines, looks[name])
        axes.set(title=title, xlabel="optimizer step", ylabel="training loss (mean over rows)")
        whole = np.concatenate([losses for lines in runs.values() for _, losses in lines])
        if whole.min() > 0 and whole.max() > _LOGARITHMIC * whole.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.grid()
    caption = (
        "Loss of each stage of the chains, a panel a kind of loss: their scales differ. Thin: single seeds; thick: "
        "their mean where they logged the same steps. A stage that several arms share is drawn once, for the first of "
        "them."
    )
    return [Drawn("curves", figure, caption)]


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
    arms = [arm for arm in report["arms"] if arm["evaluations"]]
    # One row an arm.
    traits = pd.DataFrame([_traits(arm) for arm in arms], dtype=object).fillna(_UNSET)
    drawn: list[Drawn] = []
    seen = {_CHAIN}
    for name in traits:
        if name not in seen:
            # Those with this one's value in every arm: k of two stages that vary together are one axis.
            alike = [key for key in traits if key != _CHAIN and traits[key].equals(traits[name])]
            seen.update(alike)
            drawn += _sweep(alike, arms, traits[traits[name] != _UNSET])
    return drawn


def _traits(arm: Mapping[str, Any]) -> dict[str, str]:
    """Return what tells an arm from others, as texts: its settings and its chain of stages."""
    # A cell that is not done has the first of its stages alone.
    chains = [" → ".join(stage["name"] for stage in cell["stages"]) for cell in arm["cells"]]
    texts = {
        key: repr(float(value)).removesuffix(".0") if type(value) in (int, float) else setting(value)
        for key, value in arm["settings"].items()
    }
    return {**texts, _CHAIN: max(chains, key=len, default="")}


def _sweep(alike: Sequence[str], arms: Sequence[Mapping[str, Any]], traits: pd.DataFrame) -> list[Drawn]:
    """Draw one setting, or several that are alike; nothing where no two arms differ in them alone.

    Args:
        traits: of those arms that have the setting; the index is their place in `arms`.
    """
    values = traits[alike[0]]
    rest = traits.drop(columns=alike)
    same = [list(group.index) for _, group in rest.groupby(list(rest), sort=False)]
    lines = [group for group in same if values[group].nunique() > 1]
    if not lines:
        return []
    looks = [look(at) for at in range(len(lines))]
    names = _labels(rest.loc[[group[0] for group in lines]])
    handles = [
        handle(name, colour, linestyle=dash, marker=mark)
        for name, (colour, dash, mark) in zip(names, looks, strict=True)
    ]
    groups = list(zip(lines, looks, strict=True))
    groups += [([at], (GREY, "", "D")) for group in same if group not in lines for at in group]
    if len(groups) > len(lines):
        handles.append(handle("differs in other settings too", GREY, marker="D", linestyle=""))
    title = legible(" = ".join(alike), 80)
    ticks = _ticks(values)
    step = min(_ASIDE, _MOST_ASIDE / len(groups))
    scored = dict.fromkeys(name for at in traits.index for name in arms[at]["evaluations"])
    figure, shown = spread(len(scored), 2, 3.2, f"Scores against {title}", handles, WIDTH if len(scored) > 1 else 7.0)
    for axes, evaluation in zip(shown, scored, strict=True):
        for number, (group, how) in enumerate(groups):
            known = [at for at in group if evaluation in arms[at]["evaluations"]]
            known.sort(key=lambda at: ticks.index(values[at]))
            places = [ticks.index(values[at]) + step * number for at in known]
            if known:
                _line(axes, places, [arms[at]["evaluations"][evaluation] for at in known], how)
        axes.set_xticks(range(len(ticks)), [legible(text, 18) for text in ticks])
        metric = having(evaluation, arms)[0]["evaluations"][evaluation]["metric"]
        axes.set(title=legible(evaluation), xlabel=title, ylabel=f"{legible(metric)}, mean")
        axes.grid()
    caption = (
        f"Scores against {' = '.join(alike)}, with 95 % intervals over seeds and records; small dots are single seeds. "
        "A line joins arms that differ in nothing else. Values are evenly spaced, and points of the same value stand a "
        "little aside of each other."
    )
    return [Drawn(slug("setting", alike[0]), figure, caption)]


def _line(axes: Axes, places: Sequence[float], found: Sequence[Mapping[str, Any]], how: Look) -> None:
    """Draw the scores of one group of arms, from left to right."""
    colour, dash, mark = how
    sides = np.asarray([bars(one["overall"]) for one in found]).T
    shape = {"linestyle": dash, "marker": mark, "markersize": 5, "capsize": 2.5, "linewidth": 1.4}
    axes.errorbar(places, [one["overall"]["mean"] for one in found], yerr=sides, color=colour, **shape)
    dots(axes, [(place, seed["score"]) for place, one in zip(places, found, strict=True) for seed in one["by_seed"]])


def _ticks(values: Iterable[str]) -> list[str]:
    """Return the values of a setting from left to right: numbers by size, words in the study's order."""
    found = list(dict.fromkeys(values))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def _labels(lines: pd.DataFrame) -> list[str]:
    """Name the lines by the settings and stages that tell them apart; `lines` holds the traits of one arm of each."""
    differ = lines.loc[:, lines.nunique() > 1]
    if differ.empty:
        return ["arms that differ in nothing else"]
    rows = differ.to_dict("records")
    return [legible(", ".join(f"{key} {text}" for key, text in row.items() if text != _UNSET), 60) for row in rows]
