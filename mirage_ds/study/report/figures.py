"""The report's dict → its figures. What has nothing to show gives no figure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.inspect import style
from mirage_ds.study.report.statistics import level_key
from mirage_ds.study.report.text import evaluations, having, judged, label, pair, setting
from mirage_ds.study.results import Results

Report = Mapping[str, Any]
INTERVAL = "95 % interval"
# Losses whose largest is so many times the smallest are drawn on a logarithmic axis.
_LOGARITHMIC = 8
# How the chain of stages is called among the settings.
_CHAIN = "stages"
# Instead of a value that an arm has not; no setting's text. Not NUL, which numpy cuts off on pandas' way to fill it in.
_UNSET = "\x1f"
# Values stand 1 apart; groups of arms stand so far aside of each other, all of them at most so far.
_ASIDE, _MOST_ASIDE = 0.06, 0.6


class Drawn:
    """A figure with its legend, the stem of its file's name, and how to read it."""

    def __init__(self, name: str, figure: Figure, caption: str):
        style.legend(figure)
        self.name, self.figure, self.caption = name, figure, caption


def slug(*texts: str) -> str:
    """Return texts as a file's name without odd characters."""
    return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "x" for text in texts)[:80]


def _rows(
    axes: Axes, names: Sequence[str], series: Sequence[tuple[str, str, str, Sequence[Any]]], step: float = 0.0
) -> None:
    """Draw intervals in named rows.

    Args:
        series: name, colour, marker, and an Estimate or None a row; each stands so much of a row below the one before.
    """
    for number, (name, colour, mark, found) in enumerate(series):
        for row, one in enumerate(found):
            if one is not None:
                style.interval(axes, row + step * (number - (len(series) - 1) / 2), one, colour, mark, name)
    style.name_rows(axes, names, 70)
    axes.grid(axis="x")


def _beside(axes: Axes, texts: Sequence[str]) -> None:
    """Write a text on the right of each row."""
    words = axes.secondary_yaxis("right")
    words.set_yticks(range(len(texts)), texts)
    words.tick_params(length=0)
    words.spines["right"].set_visible(False)


def lead(report: Report) -> Drawn:
    """Draw what stands first: the primary evaluation's scores over all records, or the first one's."""
    evaluation = next(iter(evaluations(report)))
    arms = [arm["evaluations"][evaluation] for arm in having(evaluation, report["arms"])]
    chance = report["chance"].get(evaluation)
    title = f"{evaluation}: {arms[0]['metric']}"
    figure, (axes,) = style.panels(1, 1, style.ROW * len(arms) + 0.75, width=7.0, title=title)
    _score_panel(axes, report, evaluation, None)
    axes.set(title="", xlabel=f"mean over all records of {evaluation}")
    _beside(axes, [f"{one['overall']['mean']:.3f}" for one in arms])
    dotted = f" {style.caption('chance', **chance)}" if chance else ""
    return Drawn("lead", figure, style.caption("lead") + dotted)


def scores(report: Report) -> list[Drawn]:
    """Draw the scores of each evaluation, an arm a row, overall and level by level; not again what `lead` shows."""
    drawn = []
    for number, (evaluation, levels) in enumerate(evaluations(report).items()):
        if number == 0 and len(levels) < 2:
            continue
        arms = having(evaluation, report["arms"])
        metric = arms[0]["evaluations"][evaluation]["metric"]
        # One level is the same as all.
        parts: list[str | None] = [None, *(levels if len(levels) > 1 else [])]
        height, shared = style.ROW * len(arms) + 0.75, {"sharex": True, "sharey": True}
        figure, shown = style.panels(len(parts), 3, height, title=f"{evaluation}: {metric}", **shared)
        for axes, level in zip(shown, parts, strict=True):
            _score_panel(axes, report, evaluation, level)
            axes.set_xlabel(f"{style.legible(metric)}, mean")
            axes.tick_params(labelbottom=True)
        caption = style.caption("scores", evaluation=evaluation, metric=metric)
        drawn.append(Drawn(slug("scores", evaluation), figure, caption))
    return drawn


def _score_panel(axes: Axes, report: Report, evaluation: str, level: str | None) -> None:
    """Draw the arms' scores at a level, or of all records; with the primary contrast's base and what chance gets."""

    def at_level(found: Mapping[str, Any], whole: Any) -> Any:
        return whole if level is None else found["levels"].get(level)

    arms = {arm["name"]: arm["evaluations"][evaluation] for arm in having(evaluation, report["arms"])}
    means = {name: at_level(found, found["overall"]) for name, found in arms.items()}
    names = [style.legible(label(name), 30) for name in means]
    _rows(axes, names, [(f"mean, {INTERVAL}", style.BLUE, "o", list(means.values()))])
    primary, chance = report["primary"], report["chance"].get(evaluation)
    if primary and not primary["problem"] and primary["evaluation"] == evaluation and (base := means[primary["base"]]):
        named = f"mean of {style.legible(label(primary['base']))}"
        axes.axvline(base["mean"], color=style.BLACK, linestyle="--", linewidth=1, zorder=1, label=named)
    if chance is not None and (value := at_level(chance, chance["overall"])) is not None:
        how: Any = {"color": style.VERMILLION, "linestyle": ":", "linewidth": 1.4, "zorder": 1}
        axes.axvline(value, **how, label="best constant answer")
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
    figure, (axes,) = style.panels(1, 1, 0.36 * len(found) + 0.75, title="Differences between arms")
    axes.axvspan(-margin, margin, color=style.GREEN, alpha=0.15, linewidth=0, label=f"± {margin:g}")
    axes.axvline(0, color=style.BLACK, linewidth=1)
    for row, one in enumerate(found):
        kind, colour = ("primary", style.VERMILLION) if one is first else ("other", style.BLUE)
        apart = one["difference"]
        axes.hlines(row, apart["low90"], apart["high90"], color=colour, linewidth=5, alpha=0.35, label="90 % interval")
        style.interval(axes, row, apart, colour, label=f"{kind}, {INTERVAL}")
        style.dots(axes, [(seed["difference"], row + 0.25) for seed in one["by_seed"]])
    style.name_rows(axes, [pair(one) for one in found], 70)
    _beside(axes, [judged(one, margin).replace(", and", ",\nand") for one in found])
    metrics = dict.fromkeys(style.legible(one["metric"]) for one in found)
    axes.set_xlabel(f"difference in {', '.join(metrics)} (arm − base)")
    axes.grid(axis="x")
    return [Drawn("contrasts", figure, style.caption("contrasts", margin=margin))]


def controls(report: Report) -> list[Drawn]:
    """Draw the scores under each condition, and which path the answers follow, one figure each an evaluation."""
    drawn = []
    for evaluation in dict.fromkeys(entry["evaluation"] for entry in report["controls"]):
        entries = [entry for entry in report["controls"] if entry["evaluation"] == evaluation]
        if scored := [entry for entry in entries if entry["conditions"]]:
            named = slug("controls", evaluation)
            drawn.append(Drawn(named, _conditions(scored, report), style.caption("controls")))
        if followed := [entry for entry in entries if entry["path"]]:
            drawn.append(Drawn(slug("follow", evaluation), _paths(followed), style.caption("follow")))
    return drawn


def _conditions(entries: Sequence[Mapping[str, Any]], report: Report) -> Figure:
    names = list(dict.fromkeys(name for entry in entries for name in entry["conditions"]))
    order = [arm["name"] for arm in report["arms"]]
    title = f"{entries[0]['evaluation']}: {entries[0]['metric']} with other latents"
    height = len(names) * max(0.3, 0.13 * len(entries) + 0.12) + 0.6
    figure, (axes,) = style.panels(1, 1, height, title=title)
    series = []
    for entry in entries:
        colour, _, mark = style.look(order.index(entry["arm"]))
        found = [entry["conditions"].get(name) for name in names]
        series.append((style.legible(label(entry["arm"])), colour, mark, found))
    _rows(axes, names, series, min(0.16, 0.8 / len(entries)))
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color=style.GREY, linewidth=0.5, alpha=0.5)
    axes.set(xlabel=f"{style.legible(entries[0]['metric'])}, mean", ylabel="latents fed")
    return figure


def _paths(entries: Sequence[Mapping[str, Any]]) -> Figure:
    looks = zip(VERDICTS, ((style.VERMILLION, "o"), (style.BLUE, "s"), (style.GREY, "^")), strict=True)
    title = f"{entries[0]['evaluation']}: which path's latents the answer follows"
    figure, (shares, apart) = style.panels(2, 2, 0.42 * len(entries) + 0.75, title=title, sharey=True)
    arms = [style.legible(label(entry["arm"]), 30) for entry in entries]
    series = [(f"follows {kind}", *how, [entry["path"][kind] for entry in entries]) for kind, how in looks]
    _rows(shares, arms, series, 0.2)
    _rows(apart, arms, [("", style.BLACK, "o", [entry["path"]["difference"] for entry in entries])])
    apart.axvline(0, color=style.BLACK, linewidth=1)
    shares.set(xlabel="share of answers", xlim=(-0.02, 1.02))
    apart.set(xlabel="share that follows the injected path − the other")
    return figure


def curves(results: Results, report: Report) -> list[Drawn]:
    """Draw loss, or reward, against optimizer step, one colour an arm, one panel a position in the chain and kind.

    Losses of other stages, or with other weights, are of other scales.
    """
    order = [arm["name"] for arm in report["arms"]]
    runs = _runs(results, order)
    if runs.empty:
        return []
    kinds = runs.groupby(["position", "kind"], sort=False)
    figure, shown = style.panels(len(kinds), 2, 3.1, title="Training")
    for axes, ((position, kind), own) in zip(shown, kinds, strict=True):
        for arm, lines in own.groupby("arm", sort=False):
            _draw(axes, lines, style.look(order.index(arm)), style.legible(label(arm)))
        names, count = ", ".join(dict.fromkeys(own["name"])), len(own)
        title = style.legible(f"{position}, {kind}: {names} ({count} run{'s' * (count > 1)})", 60)
        what = "reward (mean over a rollout)" if kind.startswith("rl") else "training loss (mean over rows)"
        axes.set(title=title, xlabel="optimizer step", ylabel=what)
        whole = np.concatenate(list(own["losses"]))
        if whole.min() > 0 and whole.max() > _LOGARITHMIC * whole.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.grid()
    return [Drawn("curves", figure, style.caption("curves"))]


def _runs(results: Results, order: Sequence[str]) -> pd.DataFrame:
    """List the runs that have a curve, position by position in their chains, each once at a position."""
    rows = []
    for cell in sorted(results.cells, key=lambda one: order.index(one.arm)):
        weights = "".join(f", {key} {value}" for key, value in cell.settings.items() if key.endswith("_weight"))
        for position, stage in enumerate(cell.stages, 1):
            own = "reward" if stage.stage == "rl" else "loss"
            points = [(one["step"], one[own]) for one in stage.curve if own in one]
            if points:
                steps, losses = np.asarray(points, dtype=np.float64).T
                rows.append((position, f"{stage.stage}{weights}", stage.key, stage.name, cell.arm, steps, losses))
    runs = pd.DataFrame(rows, columns=["position", "kind", "key", "name", "arm", "steps", "losses"])
    return runs.drop_duplicates(["position", "kind", "key"]).sort_values("position", kind="stable")


def _draw(axes: Axes, lines: pd.DataFrame, how: style.Look, name: str) -> None:
    """Draw the runs of one arm, and their mean."""
    colour, dash, mark = how
    first = lines["steps"].iloc[0]
    # A single point has no line.
    dot = mark if all(len(steps) == 1 for steps in lines["steps"]) else ""
    shape: Any = {"color": colour, "linestyle": dash, "marker": dot, "label": name}
    if len(lines) > 1:
        for steps, losses in zip(lines["steps"], lines["losses"], strict=True):
            axes.plot(steps, losses, linewidth=0.5, alpha=0.3, **shape)
    if all(np.array_equal(steps, first) for steps in lines["steps"]):
        axes.plot(first, np.mean(list(lines["losses"]), axis=0), linewidth=1.8, markersize=4, zorder=3, **shape)


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
    names = _labels(rest.loc[[group[0] for group in lines]])
    groups = [(group, style.look(at), name) for at, (group, name) in enumerate(zip(lines, names, strict=True))]
    alone, apart = (style.GREY, "", "D"), "differs in other settings too"
    groups += [([at], alone, apart) for group in same if group not in lines for at in group]
    title = style.legible(" = ".join(alike), 80)
    # Numbers by size, then words in the study's order.
    ticks = sorted(dict.fromkeys(values), key=lambda text: level_key(text)[:2])
    step = min(_ASIDE, _MOST_ASIDE / len(groups))
    scored = dict.fromkeys(name for at in traits.index for name in arms[at]["evaluations"])
    width = style.WIDTH if len(scored) > 1 else 7.0
    figure, shown = style.panels(len(scored), 2, 3.2, width=width, title=f"Scores against {title}")
    for axes, evaluation in zip(shown, scored, strict=True):
        for number, (group, how, name) in enumerate(groups):
            known = [at for at in group if evaluation in arms[at]["evaluations"]]
            known.sort(key=lambda at: ticks.index(values[at]))
            places = [ticks.index(values[at]) + step * number for at in known]
            if known:
                _line(axes, places, [arms[at]["evaluations"][evaluation] for at in known], how, name)
        axes.set_xticks(range(len(ticks)), [style.legible(text, 18) for text in ticks])
        metric = having(evaluation, arms)[0]["evaluations"][evaluation]["metric"]
        axes.set(title=style.legible(evaluation), xlabel=title, ylabel=f"{style.legible(metric)}, mean")
        axes.grid()
    return [Drawn(slug("setting", alike[0]), figure, style.caption("setting", names=" = ".join(alike)))]


def _line(axes: Axes, places: Sequence[float], found: Sequence[Mapping[str, Any]], how: style.Look, name: str) -> None:
    """Draw the scores of one group of arms, from left to right."""
    colour, dash, mark = how
    sides = np.asarray([style.bars(one["overall"]) for one in found]).T
    shape: Any = {"linestyle": dash, "marker": mark, "markersize": 5, "capsize": 2.5, "linewidth": 1.4}
    means = [one["overall"]["mean"] for one in found]
    axes.errorbar(places, means, yerr=sides, color=colour, label=name, **shape)
    seeds = [(place, seed["score"]) for place, one in zip(places, found, strict=True) for seed in one["by_seed"]]
    style.dots(axes, seeds)


def _labels(lines: pd.DataFrame) -> list[str]:
    """Name the lines by the settings and stages that tell them apart; `lines` holds the traits of one arm of each."""
    told = [
        ", ".join(f"{key} {text}" for key, text in row.items() if text != _UNSET)
        for _, row in lines.loc[:, lines.nunique() > 1].iterrows()
    ]
    return [style.legible(one or "arms that differ in nothing else", 60) for one in told]
