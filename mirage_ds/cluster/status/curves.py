"""Metrics of several runs in one figure, from their logs alone.

n points of a run; a moving mean over m of them stands at the last of its steps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from mirage_ds.analysis.inspect.style import Look, legend, legible, look, panels, png, room, styled
from mirage_ds.cluster.status.facts import json_lines, split_log
from mirage_ds.cluster.status.names import short_names
from mirage_ds.errors import UserError
from mirage_ds.files import write_atomically

DEFAULT = ("loss", "eval_loss")
# Without --smooth the moving mean is over this part of the longest run's steps.
SMOOTHED = 50
# Values whose largest is so many times the smallest are drawn on a logarithmic axis.
LOGARITHMIC = 8
# So many points of a run still stand apart as dots.
FEW = 100
TITLES = {
    "loss": "training loss",
    "ce": "cross-entropy",
    "sim": "1 − mean cosine of the latents",
    "mfu": "model FLOPs utilization",
    "grad_norm": "gradient's norm before clipping",
    "lr": "learning rate",
}
AXES = {"step": "optimizer step", "rows": "rows seen", "tokens": "tokens seen", "seconds": "seconds in optimizer steps"}


class Curve(NamedTuple):
    """One metric of one run: x and y (n,), in the order of steps; NaN where a step has no such number."""

    x: np.ndarray
    y: np.ndarray


def read_curves(folder: Path, against: str) -> dict[str, Curve]:
    """Read every number of a run's log, resumed parts joined.

    Args:
        folder: a --save_model_path.
        against: "step", or what is summed up over the steps: "rows", "tokens", "seconds".
    """
    steps, evaluations = split_log(json_lines(folder / "run" / "log.jsonl"))
    places = [float(one["step"]) for one in steps]
    if against != "step":
        places = np.cumsum([float(one.get(against) or 0) for one in steps]).tolist()
    at = {one["step"]: place for one, place in zip(steps, places, strict=True)}
    names = dict.fromkeys(
        name for one in (*steps, *evaluations) for name, value in one.items() if not math.isnan(_number(value))
    )
    found = {}
    for name in names:
        # An evaluation whose step is not in the log has no place.
        own = [one for one in (evaluations if name.startswith("eval_") else steps) if one["step"] in at]
        found[name] = Curve(
            np.asarray([at[one["step"]] for one in own]), np.asarray([_number(one.get(name)) for one in own])
        )
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and those before it, `width` of them at most; NaN counts for nothing.

    Args:
        values: (n,).

    Returns:
        (n,), NaN where all are.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(0, end - width)
    count = counts[end] - counts[begin]
    return np.where(count > 0, (sums[end] - sums[begin]) / np.maximum(count, 1), np.nan)


def draw_runs(
    folders: Sequence[Path], out: Path, metrics: Sequence[str] | None, smooth: int | None, against: str
) -> str:
    """Draw and write the picture.

    Args:
        out: .png or .svg; an old one is replaced.
        metrics: names of log.jsonl; None for those of DEFAULT that there are.
        smooth: steps of the moving mean; None for the SMOOTHED-th part of the longest run's.

    Returns:
        A line that says what was drawn.

    Raises:
        UserError: no run has taken a step, or a metric is in no log; `out` cannot be written.
    """
    runs = [read_curves(folder, against) for folder in folders]
    there = sorted({name for run in runs for name in run} - {"step", "time"})
    if not there:
        raise UserError(f"{folders[0]}{' and the others' * (len(folders) > 1)}: no step has been logged yet; try later")
    for name in metrics or ():
        if name not in there:
            raise UserError(f"--metric {name}: in no log of these runs; there are {', '.join(there)}")
    wanted = list(dict.fromkeys(metrics)) if metrics else [name for name in DEFAULT if name in there]
    with styled():
        figure = _figure(short_names(folders), runs, wanted, smooth, against)
        content = png(figure) if out.suffix == ".png" else _svg(figure)
    try:
        write_atomically(out, content)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return f"{out}: {', '.join(wanted)} of {len(folders)} run(s)"


def _figure(
    names: Sequence[str], runs: Sequence[dict[str, Curve]], wanted: Sequence[str], smooth: int | None, against: str
) -> Figure:
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, label=legible(name, 60))
        for name, (colour, dash, _) in zip(names, map(look, range(len(runs))), strict=True)
    ]
    across = min(2, len(wanted))
    size = 10.6 if across > 1 else 7.4
    beside = room([str(one.get_label()) for one in handles], size)
    figure, grid = panels(-(-len(wanted) // across), across, 3.4, width=size, beside=beside)
    longest = max(len(run[name].x) for run in runs for name in run)
    mean_over = smooth or max(1, longest // SMOOTHED)
    ends = [float(run[name].x[-1]) for run in runs for name in wanted if name in run and len(run[name].x)]
    for number, axes in enumerate(grid.flat):
        if number >= len(wanted):
            axes.set_visible(False)
            continue
        name = wanted[number]
        measured = name.startswith("eval_")
        for which, run in enumerate(runs):
            if name in run:
                # Of curves that lie on each other the lower ones are wider.
                width = 1.3 + 0.9 * (len(runs) - 1 - which) / max(1, len(runs) - 1)
                _draw(axes, run[name], look(which), width, 0 if measured else mean_over)
        smoothed = "" if measured or mean_over == 1 else f", mean over {mean_over} steps"
        axes.set_title(f"{title_of(name)}{smoothed}")
        axes.set(xlabel=AXES[against], ylabel=legible(name), xlim=(0, 1.02 * max(ends, default=1.0)))
        axes.xaxis.set_major_formatter(EngFormatter())
        _scale(axes, [run[name].y for run in runs if name in run])
    legend(figure, handles, size)
    return figure


def title_of(name: str) -> str:
    """Return a metric's title."""
    if name.startswith("eval_"):
        own = name.removeprefix("eval_")
        return f"evaluation: {'loss' if own == 'loss' else TITLES.get(own, legible(own))}"
    return TITLES.get(name, legible(name.replace("_", " ")))


def _draw(axes: Axes, curve: Curve, how: Look, width: float, mean_over: int) -> None:
    """Draw one run: its points faint, their moving mean in front.

    Args:
        width: of the line, in points; mean_over: steps of the mean, 0 for the points themselves, joined and with marks.
    """
    colour, dash, mark = how
    if mean_over == 0:
        axes.plot(curve.x, curve.y, color=colour, linestyle=dash, linewidth=width, marker=mark, markersize=3 + width)
        return
    # A step without a number leaves a gap in the points, none in the mean.
    dots = "." if len(curve.x) <= FEW else ""
    axes.plot(curve.x, curve.y, color=colour, linewidth=0.6, alpha=0.3, marker=dots, markersize=5, markeredgewidth=0)
    alone = mark if len(curve.x) == 1 else ""
    mean = moving_mean(curve.y, mean_over)
    axes.plot(curve.x, mean, color=colour, linestyle=dash, linewidth=width, marker=alone, markersize=4, zorder=3)


def _scale(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    axes.grid()
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > LOGARITHMIC * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> bytes:
    """Write a figure as SVG, the same bytes every time."""
    import matplotlib

    buffer: Any = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mirage-ds"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    content: bytes = buffer.getvalue()
    return content
