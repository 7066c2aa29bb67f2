"""Numbers → matplotlib figures, in the style of style.styled(). No global state: figures are made without pyplot.

k latents, Q tokens of the answer, L layers, m words.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from mirage_ds.analysis.inspect.corpus import Projection
from mirage_ds.analysis.inspect.look import PARTS, Look
from mirage_ds.analysis.inspect.measure import Words
from mirage_ds.analysis.inspect.probe import Reading
from mirage_ds.analysis.inspect.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    interval,
    legible,
    name_rows,
    panels,
)

# More latents than these go on in the next row.
LATENTS_A_ROW = 6
# Of longer answers the first so many tokens are shown.
MOST_TOKENS = 24
# Letters of a word or token.
LETTERS = 16


def _outlines(picture: np.ndarray) -> np.ndarray:
    """Make a picture (height, width, 3) a veil (height, width, 4) that darkens or lightens what lies below it.

    Where the picture is as bright as most of it, colours below keep their exact meaning.
    """
    brightness = picture.mean(-1) / 255
    difference = brightness - np.median(brightness)
    return np.dstack([*(3 * [(difference > 0).astype(float)]), 0.8 * np.abs(difference)])


def similarity(look: Look, small: bool = False) -> Figure | None:
    """Draw each latent's cosine to the features of each image over that image; None for a row without images.

    Args:
        small: for a place of 4 × 2.5 inches: here and below, only the first panel, or letters that are larger in it.
    """
    if not look.similarity:
        return None
    k = len(look.norms)
    across = min(k, LATENTS_A_ROW)
    down = -(-k // across)
    # Inches of a row: of the image, within limits, and of the names above it.
    sides = [picture.shape[0] / picture.shape[1] for _, picture, _ in look.similarity for _ in range(down)]
    heights = [1.45 * min(max(side, 0.3), 2.5) + 0.25 for side in sides]
    width, title = max(5.0, 1.45 * across + 2.8), f"{look.title}: where in the images the latents point"
    figure, grid = panels(
        len(heights), across + 1, sum(heights) / len(heights), width=width, title=title, height_ratios=heights
    )
    # The layout forgets some of what stands beside a colour bar that several rows share.
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1 - 0.12 / width, 1))
    for axes in grid.flat:
        axes.axis("off")
    for number, (name, picture, cosines) in enumerate(look.similarity):
        rows = grid[number * down : (number + 1) * down]
        rows[0, 0].imshow(picture)
        rows[0, 0].set_title(name)
        options: dict[str, Any] = {"vmin": float(cosines.min()), "vmax": float(cosines.max()), "cmap": "viridis"}
        options |= {"extent": (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5), "interpolation": "nearest"}
        for latent, axes in enumerate(rows[:, 1:].flat[:k]):
            shown = axes.imshow(cosines[latent].numpy(), **options)
            axes.imshow(_outlines(picture))
            axes.set_title(f"latent {latent + 1}")
        figure.colorbar(shown, ax=list(rows.flat), shrink=0.8, pad=0.01, label="cosine")
    if small:
        figure.set_size_inches(*(0.65 * figure.get_size_inches()))
    return figure


def _count(axis: Axis, ticks: int) -> None:
    """Label the ticks 0, 1, … of an axis 1, 2, …"""
    axis.set_ticks(range(ticks), [str(tick + 1) for tick in range(ticks)])


def _cells(axes: Axes, values: np.ndarray, texts: Callable[[int, int], str], fontsize: int, **options: Any) -> Any:
    """Draw a matrix as colours with a text in each cell; return what a colour bar needs."""
    image = axes.imshow(values, **options)
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > middle else "white"
        axes.text(column, row, texts(row, column), color=colour, ha="center", va="center", fontsize=fontsize)
    _count(axes.xaxis, values.shape[1])
    _count(axes.yaxis, values.shape[0])
    return image


def _table(axes: Axes, words: Words, spellings: dict[int, str], title: str, unit: str) -> None:
    scores = words.scores.T.numpy()

    def text(row: int, latent: int) -> str:
        word, score = spellings[int(words.ids[latent, row])], scores[row, latent]
        return f"{legible(word, LETTERS)}\n{'<0.01' if 0 <= score < 0.005 else f'{score:.2f}'}"

    image = _cells(axes, scores, text, 8, cmap="cividis", aspect="auto")
    axes.set(xlabel="latent", ylabel="rank", title=title)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=unit, pad=0.02)


def words(look: Look, small: bool = False) -> Figure:
    """Write the nearest words of each latent, by cosine and as the head reads it."""
    k, m = look.nearest.ids.shape
    # Of more than four latents the two tables stand one below the other.
    across, down = (1, 1) if small else (2, 1) if k <= 4 else (1, 2)
    width, title = max(4.0 * across, across * (1.15 * k + 1.3)), f"{look.title}: the words nearest to the latents"
    figure, grid = panels(down, across, 0.42 * m + 1.0, width=width, title=title)
    _table(grid.flat[0], look.nearest, look.spellings, "nearest output vectors", "cosine")
    if not small:
        _table(grid.flat[1], look.lens, look.spellings, "logit lens: what the head would emit", "probability")
    return figure


def norms(look: Look, small: bool = False) -> Figure:
    """Draw the latents' norms among those of the inputs, and with a helper the cosines to its targets."""
    wide = look.to_targets is not None and not small
    title = f"{look.title}: norms{' and cosines to the targets' if wide else ''}"
    ratios = [1.35, 1] if wide else [1]
    figure, grid = panels(1, len(ratios), 3.2, width=9.2 if wide else 5.6, title=title, width_ratios=ratios)
    axes = grid[0, 0]
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
    axes.set_title("norm of what is fed back, among the inputs' norms")
    # Above the bars, whatever is where.
    axes.set_ylim(top=1.45 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper left")
    if look.to_targets is not None and not small:
        axes, cosines = grid[0, 1], look.to_targets.numpy()
        size = 8 if len(look.norms) <= 6 else 6
        image = _cells(axes, cosines, lambda row, column: f"{cosines[row, column]:.2f}", size, cmap="viridis")
        axes.set(xlabel="target of the helper image", ylabel="latent", title="cosine to the compressed targets")
        figure.colorbar(image, ax=axes, label="cosine")
    return figure


def attends(look: Look, small: bool = False) -> Figure | None:
    """Draw what the answer's tokens attend to; None where no token follows the latent block."""
    if not look.answer:
        return None
    layers, count, k = look.attention.shape
    tokens = [legible(token, LETTERS) for token in look.answer[:MOST_TOKENS]]
    note = f" (first {len(tokens)} of {count} tokens on the right)" if count > len(tokens) and not small else ""
    title = f"{look.title}: attention from the answer, mean over heads{note}"
    ratios, width, height = ([1.3], 4.6, 3.0) if small else ([1.3, 1, 1.1], 11.0, max(3.5, 1.2 + 0.15 * len(tokens)))
    figure, grid = panels(1, len(ratios), height, width=width, title=title, width_ratios=ratios)
    # Of many layers every fourth is named.
    step = 1 if layers <= 12 else 4
    named = [str(number + 1) if number % step == 0 else "" for number in range(layers)]
    parts = grid[0, 0]
    left = np.zeros(layers)
    for name, colour, values in zip(PARTS, (SKY, GREY, VERMILLION, ORANGE), look.shares.T.numpy() * 100, strict=True):
        parts.barh(range(layers), values, left=left, color=colour, label=name)
        left += values
    name_rows(parts, named)
    parts.set(xlabel="% of attention, mean over the answer's tokens", ylabel="layer", xlim=(0, 100))
    parts.set_title(f"what the answer attends to\n(evenly spread: latents {100 * look.uniform:.1f} %)")
    figure.legend(*parts.get_legend_handles_labels(), loc="outside lower left", ncols=2 if small else 4)
    if small:
        return figure
    by_layer, by_token = look.attention.mean(1), look.attention[:, : len(tokens)].mean(0)
    for axes, values, title, names, what in (
        (grid[0, 1], by_layer, "each layer, mean over tokens", named, "layer"),
        (grid[0, 2], by_token, "each token, mean over layers", tokens, "token of the answer"),
    ):
        image = axes.imshow(100 * values.numpy(), cmap="cividis", aspect="auto", vmin=0)
        _count(axes.xaxis, k)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="latent", ylabel=what, title=f"attention to the latents:\n{title}")
        figure.colorbar(image, ax=axes, label="%")
    return figure


def pca(raw: Projection, unit: Projection, title: str) -> Figure:
    """Draw the first two principal components of all kinds of vectors, as they are and brought to length 1."""
    figure, grid = panels(1, 2, 4.4, width=10, title=title)
    looks: dict[str, tuple[str, Any]] = {
        "text embeddings": ("o", GREY),
        "input image features": ("s", SKY),
        "helper image features": ("^", GREEN),
    }
    latents = [name for name in raw.points if name not in looks]
    reds = colormaps["plasma"](np.linspace(0.15, 0.75, len(latents)))
    looks |= {latent: ("D", red) for latent, red in zip(latents, reds, strict=True)}
    for axes, found, name in zip(grid[0], (raw, unit), ("vectors as they are", "vectors of length 1"), strict=True):
        for kind, (marker, colour) in looks.items():
            if kind in found.points:
                points, label = found.points[kind].T.numpy(), f"{kind} ({len(found.points[kind])})"
                axes.scatter(*points, s=16, marker=marker, color=colour, alpha=0.65, linewidths=0, label=label)
        first, second = (100 * found.share).tolist()
        axes.set(xlabel=f"component 1 ({first:.0f} % of the variance)", ylabel=f"component 2 ({second:.0f} %)")
        axes.set_title(name)
        axes.grid()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def reads(questions: dict[str, dict[str, Reading]], title: str, unit: str) -> Figure:
    """Draw how well each question is answered from each source, with intervals and the commonest answer's accuracy.

    Args:
        unit: what is counted once, see probe.Questions.
    """
    across = 2 if len(questions) in (2, 4) else min(3, len(questions))
    sources = next(iter(questions.values()))
    one = next(iter(sources.values()))
    title = f"{title} ({one.rows} rows, {one.maps} {unit})"
    height = 0.22 * len(sources) + 0.85
    figure, grid = panels(
        -(-len(questions) // across), across, height, width=3.4 * across + 1.5, title=title, sharey=True
    )
    for axes in grid.flat[len(questions) :]:
        axes.set_visible(False)
    for axes, (question, found) in zip(grid.flat, questions.items(), strict=False):
        for row, (source, reading) in enumerate(found.items()):
            colour = VERMILLION if source == "all latents" else ORANGE if source.startswith("latent") else BLUE
            mean, low, high = (100 * number for number in (reading.accuracy, reading.low, reading.high))
            interval(axes, row, {"mean": mean, "low": low, "high": high}, colour)
        chance = 100 * next(iter(found.values())).chance
        axes.axvline(chance, color=BLACK, linestyle="--", linewidth=1)
        axes.set(
            title=f"{question} (commonest answer {chance:.0f} %)", xlabel=f"accuracy on unseen {unit}, %", xlim=(0, 102)
        )
        axes.grid(axis="x")
    name_rows(grid[0, 0], list(sources))
    return figure
