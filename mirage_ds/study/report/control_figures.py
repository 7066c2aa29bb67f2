"""The report's dict → figures of the controls: scores with other latents, and which path the answers follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mirage_ds.analysis.controls.paths import VERDICTS
from mirage_ds.analysis.inspect.style import (
    BLACK,
    BLUE,
    GREY,
    VERMILLION,
    interval,
    legend,
    legible,
    look,
    name_rows,
    panels,
    room,
)
from mirage_ds.study.report.figures import Drawn, slug

_CONDITIONS = (
    "Scores with other latents fed at the slots; own are the model's. 95 % intervals over seeds and records. Compare "
    "with the paired differences in the table, whose intervals are narrower."
)
_PATHS = (
    "The latents of one of two shortest paths were fed. Left: what share of the answers is that path, the other, or "
    "neither. Right: injected − other, which is 0 where answers do not depend on the latents. 95 % intervals."
)


def controls(report: Mapping[str, Any]) -> list[Drawn]:
    """Draw the scores under each condition, and which path the answers follow, one figure each an evaluation."""
    drawn = []
    for evaluation in dict.fromkeys(entry["evaluation"] for entry in report["controls"]):
        entries = [entry for entry in report["controls"] if entry["evaluation"] == evaluation]
        scored = [entry for entry in entries if entry["conditions"]]
        if scored:
            drawn.append(Drawn(slug("controls", evaluation), _conditions(scored, report), _CONDITIONS))
        follow = [entry for entry in entries if entry["path"]]
        if follow:
            drawn.append(Drawn(slug("follow", evaluation), _paths(follow), _PATHS))
    return drawn


def _conditions(entries: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> Figure:
    names = list(dict.fromkeys(name for entry in entries for name in entry["conditions"]))
    order = [arm["name"] for arm in report["arms"]]
    looks = [look(order.index(entry["arm"])) for entry in entries]
    handles = [
        Line2D([], [], color=colour, marker=mark, markersize=5, linestyle="", label=legible(entry["arm"]))
        for entry, (colour, _, mark) in zip(entries, looks, strict=True)
    ]
    step = min(0.16, 0.8 / len(entries))
    beside = room([str(one.get_label()) for one in handles])
    title = f"{entries[0]['evaluation']}: {entries[0]['metric']} with other latents"
    height = len(names) * max(0.3, 0.13 * len(entries) + 0.12) + 0.6
    figure, grid = panels(1, 1, height, title=title, beside=beside)
    axes = grid[0, 0]
    for number, (entry, (colour, _, mark)) in enumerate(zip(entries, looks, strict=True)):
        for row, name in enumerate(names):
            if name in entry["conditions"]:
                at = row + step * (number - (len(entries) - 1) / 2)
                interval(axes, at, entry["conditions"][name], colour, mark)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color=GREY, linewidth=0.5, alpha=0.5)
    name_rows(axes, names)
    axes.set(xlabel=f"{legible(entries[0]['metric'])}, mean", ylabel="latents fed")
    axes.grid(axis="x")
    legend(figure, handles)
    return figure


def _paths(entries: Sequence[Mapping[str, Any]]) -> Figure:
    looks = dict(zip(VERDICTS, ((VERMILLION, "o"), (BLUE, "s"), (GREY, "^")), strict=True))
    handles = [
        Line2D([], [], color=colour, marker=mark, markersize=5, linestyle="", label=f"follows {kind}")
        for kind, (colour, mark) in looks.items()
    ]
    title = f"{entries[0]['evaluation']}: which path's latents the answer follows"
    height = 0.42 * len(entries) + 0.75
    figure, grid = panels(1, 2, height, title=title, beside=room([""]), sharey=True)
    shares, apart = grid[0]
    for row, entry in enumerate(entries):
        for number, (kind, (colour, mark)) in enumerate(looks.items()):
            interval(shares, row + 0.2 * (number - 1), entry["path"][kind], colour, mark)
        interval(apart, row, entry["path"]["difference"], BLACK)
    apart.axvline(0, color=BLACK, linewidth=1)
    name_rows(shares, [entry["arm"] for entry in entries])
    shares.set(xlabel="share of answers", xlim=(-0.02, 1.02))
    apart.set(xlabel="share that follows the injected path − the other")
    for axes in (shares, apart):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    legend(figure, handles)
    return figure
