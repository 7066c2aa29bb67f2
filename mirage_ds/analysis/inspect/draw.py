"""Numbers → matplotlib figures. No global state: figures are made without pyplot.

k latents, Q tokens of the answer, L layers, m words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mirage_ds.analysis.inspect.corpus import Projection
from mirage_ds.analysis.inspect.look import PARTS, Look
from mirage_ds.analysis.inspect.measure import Words
from mirage_ds.analysis.inspect.probe import Reading
from mirage_ds.analysis.inspect.style import BLACK, BLUE, DPI, GREEN, GREY, ORANGE, SKY, VERMILLION, plain

# More latents than these go on in the next row.
LATENTS_A_ROW = 6
# Of longer answers the first so many tokens are shown.
MOST_TOKENS = 24


def _short(text: str, most: int = 16) -> str:
    """Shorten a word that the font can write."""
    text = plain(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _title(figure: Figure, text: str) -> None:
    """Write a figure's title, in as many lines as its width asks for."""
    # Letters of 11 points are 0.085 inch wide on average.
    figure.suptitle(textwrap.fill(text, int(figure.get_figwidth() / 0.095)), fontsize=11)


def _names(axes: Axes, axis: str, names: Sequence[str], **options: Any) -> None:
    """Label the ticks of an axis 0, 1, … with texts that are no formulas."""
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(range(len(names)), list(names), **options)
    for label in axes.get_xticklabels() if axis == "x" else axes.get_yticklabels():
        label.set_parse_math(False)


def _numbers(k: int) -> list[str]:
    return [str(number + 1) for number in range(k)]


def _outlines(picture: np.ndarray) -> np.ndarray:
    """Make a picture (height, width, 3) a veil (height, width, 4) that darkens or lightens what lies below it.

    Where the picture is as bright as most of it, colours below keep their exact meaning.
    """
    brightness = picture.mean(-1) / 255
    difference = brightness - np.median(brightness)
    return np.dstack([*(3 * [(difference > 0).astype(float)]), 0.8 * np.abs(difference)])


def similarity(look: Look) -> Figure | None:
    """Draw each latent's cosine to the features of each image over that image; None for a row without images."""
    if not look.similarity:
        return None
    k = len(look.norms)
    across = min(k, LATENTS_A_ROW)
    blocks = -(-k // across)
    shape = blocks * len(look.similarity), across + 1
    # Inches of a row: of the image, within limits, and of the names above it.
    sides = [picture.shape[0] / picture.shape[1] for _, picture, _ in look.similarity for _ in range(blocks)]
    heights = [1.45 * min(max(side, 0.3), 2.5) + 0.25 for side in sides]
    figure = Figure(figsize=(max(5.0, 1.45 * shape[1] + 1.35), sum(heights) + 0.6), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(*shape, squeeze=False, height_ratios=heights)
    # The layout forgets some of what stands beside a colour bar that several rows share.
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1 - 0.12 / figure.get_figwidth(), 1))
    for number, (name, picture, cosines) in enumerate(look.similarity):
        rows = range(number * blocks, (number + 1) * blocks)
        height, width = picture.shape[:2]
        limits = {"vmin": float(cosines.min()), "vmax": float(cosines.max())}
        outlines = _outlines(picture)
        shown: Any = None
        for row in rows:
            for axes in grid[row]:
                axes.axis("off")
        first = grid[rows[0], 0]
        first.imshow(picture)
        first.set_title(name, fontsize=9)
        for latent in range(k):
            axes = grid[rows[latent // across], 1 + latent % across]
            shown = axes.imshow(
                cosines[latent].numpy(),
                cmap="viridis",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="nearest",
                **limits,
            )
            axes.imshow(outlines)
            axes.set_title(f"latent {latent + 1}", fontsize=9)
        bar: Any = figure.colorbar(shown, ax=[axes for row in rows for axes in grid[row]], shrink=0.8, pad=0.01)
        bar.set_label("cosine", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    _title(figure, f"{look.title}: where in the images the latents point")
    return figure


def _cells(axes: Axes, values: np.ndarray, texts: Callable[[int, int], str], fontsize: int, **options: Any) -> Any:
    """Draw a matrix as colours with a text in each cell; return what a colour bar needs."""
    image = axes.imshow(values, **options)
    middle = (values.min() + values.max()) / 2
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": fontsize, "parse_math": False}
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, texts(row, column), color="black" if value > middle else "white", **look)
    _names(axes, "x", _numbers(values.shape[1]))
    _names(axes, "y", _numbers(values.shape[0]))
    return image


def _table(axes: Axes, words: Words, spellings: dict[int, str], title: str, unit: str) -> None:
    scores = words.scores.T.numpy()

    def text(row: int, latent: int) -> str:
        score = scores[row, latent]
        return f"{_short(spellings[int(words.ids[latent, row])])}\n{'<0.01' if 0 <= score < 0.005 else f'{score:.2f}'}"

    image = _cells(axes, scores, text, 8, cmap="cividis", aspect="auto")
    axes.set(xlabel="latent", ylabel="rank")
    axes.set_title(title, fontsize=9)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=unit, pad=0.02)


def words(look: Look) -> Figure:
    """Write the nearest words of each latent, by cosine and as the head reads it."""
    k, m = look.nearest.ids.shape
    # Of more than four latents the two tables stand one below the other.
    across, down = (2, 1) if k <= 4 else (1, 2)
    size = (max(8.0, across * (1.15 * k + 1.3)), down * (0.42 * m + 1.0) + 0.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    by_cosine, by_head = figure.subplots(down, across)
    _table(by_cosine, look.nearest, look.spellings, "nearest output vectors", "cosine")
    _table(by_head, look.lens, look.spellings, "logit lens: what the head would emit", "probability")
    _title(figure, f"{look.title}: the words nearest to the latents")
    return figure


def norms(look: Look) -> Figure:
    """Draw the latents' norms among those of the inputs, and with a helper the cosines to its targets."""
    wide = look.to_targets is not None
    figure = Figure(figsize=(9.2 if wide else 5.6, 3.4), dpi=DPI, layout="constrained")
    panels: Any = figure.subplots(1, 2 if wide else 1, squeeze=False, width_ratios=[1.35, 1] if wide else [1])
    axes = panels[0, 0]
    every = torch.cat([look.norms, look.word_norms, look.feature_norms]).clamp(min=1e-6).log10()
    bins = np.logspace(float(every.min()) - 0.05, float(every.max()) + 0.05, 60)
    for values, name, colour in (
        (look.word_norms, "input embeddings of the vocabulary", SKY),
        (look.feature_norms, "input image's features", GREEN),
    ):
        if len(values):
            weights = np.full(len(values), 100 / len(values))
            axes.hist(values.numpy(), bins=bins, weights=weights, color=colour, alpha=0.75, label=name)
    for number, norm in enumerate(look.norms.tolist()):
        axes.axvline(norm, color=VERMILLION, linewidth=1.4, label=None if number else f"the {len(look.norms)} latents")
    axes.set(xscale="log", xlabel="Euclidean norm", ylabel="% of each kind")
    axes.set_title("norm of what is fed back, among the inputs' norms", fontsize=9)
    # Above the bars, whatever is where.
    axes.set_ylim(top=1.45 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper left")
    if look.to_targets is not None:
        axes = panels[0, 1]
        cosines = look.to_targets.numpy()
        size = 8 if len(look.norms) <= 6 else 6
        image = _cells(axes, cosines, lambda row, column: f"{cosines[row, column]:.2f}", size, cmap="viridis")
        axes.set(xlabel="target of the helper image", ylabel="latent")
        axes.set_title("cosine to the compressed targets", fontsize=9)
        figure.colorbar(image, ax=axes, label="cosine")
    _title(figure, f"{look.title}: norms{' and cosines to the targets' if wide else ''}")
    return figure


def attends(look: Look) -> Figure | None:
    """Draw what the answer's tokens attend to; None where no token follows the latent block."""
    if not look.answer:
        return None
    layers, _, k = look.attention.shape
    shown = look.attention[:, :MOST_TOKENS]
    height = max(3.9, 1.6 + 0.15 * shown.shape[1])
    figure = Figure(figsize=(11, height), dpi=DPI, layout="constrained")
    parts, by_layer, by_token = figure.subplots(1, 3, width_ratios=[1.3, 1, 1.1])
    left = np.zeros(layers)
    for name, colour, values in zip(PARTS, (SKY, GREY, VERMILLION, ORANGE), look.shares.T.numpy() * 100, strict=True):
        parts.barh(range(layers), values, left=left, color=colour, label=name)
        left += values
    _names(parts, "y", _every(layers), fontsize=8)
    parts.invert_yaxis()
    parts.set(xlabel="% of attention, mean over the answer's tokens", ylabel="layer", xlim=(0, 100))
    parts.set_title(f"what the answer attends to\n(evenly spread: latents {100 * look.uniform:.1f} %)", fontsize=9)
    figure.legend(*parts.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=4)
    for axes, values, title, names, what in (
        (by_layer, look.attention.mean(1), "each layer, mean over tokens", _every(layers), "layer"),
        (by_token, shown.mean(0), "each token, mean over layers", None, "token of the answer"),
    ):
        percent = 100 * values.numpy()
        image = axes.imshow(percent, cmap="cividis", aspect="auto", vmin=0)
        _names(axes, "x", _numbers(k), fontsize=8)
        _names(axes, "y", names or [_short(token) for token in look.answer[:MOST_TOKENS]], fontsize=8)
        axes.set(xlabel="latent", ylabel=what)
        axes.set_title(f"attention to the latents:\n{title}", fontsize=9)
        figure.colorbar(image, ax=axes, label="%")
    left_out = len(look.answer) - shown.shape[1]
    note = f" (first {MOST_TOKENS} of {len(look.answer)} tokens on the right)" if left_out else ""
    _title(figure, f"{look.title}: attention from the answer, mean over heads{note}")
    return figure


def _every(layers: int) -> list[str]:
    """Name layers 1, 2, …; of many every fourth."""
    step = 1 if layers <= 12 else 4
    return [str(number + 1) if number % step == 0 else "" for number in range(layers)]


def pca(raw: Projection, unit: Projection, title: str) -> Figure:
    """Draw the first two principal components of all kinds of vectors, as they are and brought to length 1."""
    figure = Figure(figsize=(10, 4.8), dpi=DPI, layout="constrained")
    kinds = [name for name in raw.points if not name.startswith("latent")]
    latents = [name for name in raw.points if name.startswith("latent")]
    reds = colormaps["plasma"](np.linspace(0.15, 0.75, len(latents)))
    # Kind → marker, colour, size, opacity.
    looks: dict[str, tuple[str, Any, int, float]] = {
        "text embeddings": ("o", GREY, 16, 0.6),
        "input image features": ("s", SKY, 16, 0.6),
        "helper image features": ("^", GREEN, 16, 0.6),
        **{latent: ("D", red, 14, 0.7) for latent, red in zip(latents, reds, strict=True)},
    }
    panels = figure.subplots(1, 2)
    for axes, found, name in zip(panels, (raw, unit), ("vectors as they are", "vectors of length 1"), strict=True):
        for kind in [*kinds, *latents]:
            marker, colour, size, alpha = looks[kind]
            axes.scatter(*found.points[kind].T.numpy(), s=size, marker=marker, color=colour, alpha=alpha, linewidths=0)
        first, second = (100 * found.share).tolist()
        axes.set(xlabel=f"component 1 ({first:.0f} % of the variance)", ylabel=f"component 2 ({second:.0f} %)")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.25)
    marks = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=f"{kind} ({len(raw.points[kind])})")
        for kind, (marker, colour, _, _) in looks.items()
        if kind in raw.points
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=8)
    _title(figure, title)
    return figure


def reads(questions: dict[str, dict[str, Reading]], title: str) -> Figure:
    """Draw how well each question is answered from each source, with intervals and the commonest answer's accuracy."""
    across = 2 if len(questions) in (2, 4) else min(3, len(questions))
    down = -(-len(questions) // across)
    sources = list(next(iter(questions.values())))
    size = (3.4 * across + 1.5, (0.22 * len(sources) + 0.85) * down + 0.6)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in grid.flat[len(questions) :]:
        axes.set_visible(False)
    for number, (question, found) in enumerate(questions.items()):
        axes = grid.flat[number]
        for row, (source, reading) in enumerate(found.items()):
            colour = VERMILLION if source == "all latents" else ORANGE if source.startswith("latent") else BLUE
            axes.plot([100 * reading.low, 100 * reading.high], [row, row], color=colour, linewidth=2.2)
            axes.plot(100 * reading.accuracy, row, "o", color=colour, markersize=6)
        chance = 100 * next(iter(found.values())).chance
        axes.axvline(chance, color=BLACK, linestyle="--", linewidth=1, label="commonest answer")
        axes.set_title(f"{question} (commonest answer {chance:.0f} %)", fontsize=9)
        axes.set_xlim(0, 102)
        axes.grid(axis="x", alpha=0.3)
        _names(axes, "y", sources, fontsize=8)
        axes.set_xlabel("accuracy on unseen maps, %", fontsize=9)
    grid[0, 0].invert_yaxis()
    one = next(iter(next(iter(questions.values())).values()))
    _title(figure, f"{title} ({one.rows} rows, {one.maps} maps)")
    return figure
