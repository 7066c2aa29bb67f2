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

from mirage_ds.analysis.inspect import style
from mirage_ds.analysis.inspect.look import PARTS, Look
from mirage_ds.analysis.inspect.measure import Projection, Words
from mirage_ds.analysis.inspect.probe import Reading

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
    height, count = sum(heights) / len(heights), len(heights) * (across + 1)
    figure, cells = style.panels(count, across + 1, height, width=width, title=title, height_ratios=heights)
    # The layout forgets some of what stands beside a colour bar that several rows share.
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1 - 0.12 / width, 1))
    for axes in cells:
        axes.axis("off")
    grids = np.reshape(np.array(cells), (-1, down, across + 1))
    for rows, (name, picture, cosines) in zip(grids, look.similarity, strict=True):
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


def _cells(
    axes: Axes, values: np.ndarray, texts: Callable[[int, int], str], fontsize: int, unit: str, **options: Any
) -> None:
    """Draw a matrix as colours with a text in each cell, and a colour bar."""
    image = axes.imshow(values, **options)
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > middle else "white"
        axes.text(column, row, texts(row, column), color=colour, ha="center", va="center", fontsize=fontsize)
    _count(axes.xaxis, values.shape[1])
    _count(axes.yaxis, values.shape[0])
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=unit, pad=0.02)


def _table(axes: Axes, spellings: dict[int, str], words: Words, title: str, unit: str) -> None:
    scores = words.scores.T.numpy()

    def text(row: int, latent: int) -> str:
        word, score = spellings[int(words.ids[latent, row])], scores[row, latent]
        return f"{style.legible(word, LETTERS)}\n{'<0.01' if 0 <= score < 0.005 else f'{score:.2f}'}"

    _cells(axes, scores, text, 8, unit, cmap="cividis", aspect="auto")
    axes.set(xlabel="latent", ylabel="rank", title=title)


def words(look: Look, small: bool = False) -> Figure:
    """Write the nearest words of each latent, by cosine and as the head reads it."""
    tables = [(look.nearest, "nearest output vectors", "cosine")]
    if not small:
        tables.append((look.lens, "logit lens: what the head would emit", "probability"))
    k, m = look.nearest.ids.shape
    # Of more than four latents the two tables stand one below the other.
    across = len(tables) if k <= 4 else 1
    width, title = max(4.0 * across, across * (1.15 * k + 1.3)), f"{look.title}: the words nearest to the latents"
    figure, shown = style.panels(len(tables), across, 0.42 * m + 1.0, width=width, title=title)
    for axes, table in zip(shown, tables, strict=True):
        _table(axes, look.spellings, *table)
    return figure


def norms(look: Look, small: bool = False) -> Figure:
    """Draw the latents' norms among those of the inputs, and with a helper the cosines to its targets."""
    targets = None if small or look.to_targets is None else look.to_targets.numpy()
    title, ratios, width = f"{look.title}: norms", [1.0], 5.6
    if targets is not None:
        title, ratios, width = f"{title} and cosines to the targets", [1.35, 1], 9.2
    figure, (axes, *others) = style.panels(len(ratios), 2, 3.2, width=width, title=title, width_ratios=ratios)
    every = torch.cat([look.norms, look.word_norms, look.feature_norms]).clamp(min=1e-6).log10()
    bins = np.logspace(float(every.min()) - 0.05, float(every.max()) + 0.05, 60).tolist()
    words, features = "input embeddings of the vocabulary", "input image's features"
    kinds = ((words, look.word_norms, style.SKY), (features, look.feature_norms, style.GREEN))
    for name, values, colour in kinds:
        if len(values):
            weights = np.full(len(values), 100 / len(values))
            axes.hist(values.numpy(), bins=bins, weights=weights, color=colour, alpha=0.75, label=name)
    for norm in look.norms.tolist():
        axes.axvline(norm, color=style.VERMILLION, linewidth=1.4, label=f"the {len(look.norms)} latents")
    axes.set(xscale="log", xlabel="Euclidean norm", ylabel="% of each kind")
    # Not as powers of ten, which would be formulas.
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("norm of what is fed back, among the inputs' norms")
    if targets is not None:
        size = 8 if len(look.norms) <= 6 else 6
        _cells(others[0], targets, lambda row, column: f"{targets[row, column]:.2f}", size, "cosine", cmap="viridis")
        others[0].set(xlabel="target of the helper image", ylabel="latent", title="cosine to the compressed targets")
    style.legend(figure)
    return figure


def attends(look: Look, small: bool = False) -> Figure | None:
    """Draw what the answer's tokens attend to; None where no token follows the latent block."""
    if not look.answer:
        return None
    layers, count, k = look.attention.shape
    tokens = [style.legible(token, LETTERS) for token in look.answer[:MOST_TOKENS]]
    note = f" (first {len(tokens)} of {count} tokens on the right)" if count > len(tokens) and not small else ""
    title = f"{look.title}: attention from the answer, mean over heads{note}"
    ratios, width, height = ([1.3], 4.6, 3.0) if small else ([1.3, 1, 1.1], 11.0, max(3.5, 1.2 + 0.15 * len(tokens)))
    figure, (parts, *matrices) = style.panels(len(ratios), 3, height, width=width, title=title, width_ratios=ratios)
    # Of many layers every fourth is named.
    step = 1 if layers <= 12 else 4
    named = [str(number + 1) if number % step == 0 else "" for number in range(layers)]
    left, colours = np.zeros(layers), (style.SKY, style.GREY, style.VERMILLION, style.ORANGE)
    for name, colour, values in zip(PARTS, colours, look.shares.T.numpy() * 100, strict=True):
        parts.barh(range(layers), values, left=left, color=colour, label=name)
        left += values
    style.name_rows(parts, named)
    parts.set(xlabel="% of attention, mean over the answer's tokens", ylabel="layer", xlim=(0, 100))
    parts.set_title(f"what the answer attends to\n(evenly spread: latents {100 * look.uniform:.1f} %)")
    by_layer, by_token = look.attention.mean(1), look.attention[:, : len(tokens)].mean(0)
    shown = (
        (by_layer, "each layer, mean over tokens", named, "layer"),
        (by_token, "each token, mean over layers", tokens, "token of the answer"),
    )
    for axes, (weights, which, names, what) in zip(matrices, shown, strict=False):
        image = axes.imshow(100 * weights.numpy(), cmap="cividis", aspect="auto", vmin=0)
        _count(axes.xaxis, k)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="latent", ylabel=what, title=f"attention to the latents:\n{which}")
        figure.colorbar(image, ax=axes, label="%")
    style.legend(figure)
    return figure


def pca(raw: Projection, unit: Projection, title: str) -> Figure:
    """Draw the first two principal components of all kinds of vectors, as they are and brought to length 1."""
    figure, shown = style.panels(2, 2, 4.4, width=10, title=title)
    looks: dict[str, tuple[str, Any]] = {
        "text embeddings": ("o", style.GREY),
        "input image features": ("s", style.SKY),
        "helper image features": ("^", style.GREEN),
    }
    latents = [name for name in raw.points if name not in looks]
    reds = colormaps["plasma"](np.linspace(0.15, 0.75, len(latents)))
    looks |= {latent: ("D", red) for latent, red in zip(latents, reds, strict=True)}
    for axes, found, name in zip(shown, (raw, unit), ("vectors as they are", "vectors of length 1"), strict=True):
        for kind, (marker, colour) in looks.items():
            if kind in found.points:
                (x, y), label = found.points[kind].T.numpy(), f"{kind} ({len(found.points[kind])})"
                axes.scatter(x, y, s=16, marker=marker, color=colour, alpha=0.65, linewidths=0, label=label)
        first, second = (100 * found.share).tolist()
        axes.set(xlabel=f"component 1 ({first:.0f} % of the variance)", ylabel=f"component 2 ({second:.0f} %)")
        axes.set_title(name)
        axes.grid()
    style.legend(figure)
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
    height, width = 0.22 * len(sources) + 0.85, 3.4 * across + 1.5
    figure, shown = style.panels(len(questions), across, height, width=width, title=title, sharey=True)
    for axes, (question, found) in zip(shown, questions.items(), strict=True):
        for row, (source, reading) in enumerate(found.items()):
            latent = style.ORANGE if source.startswith("latent") else style.BLUE
            numbers = {"mean": 100 * reading.accuracy, "low": 100 * reading.low, "high": 100 * reading.high}
            style.interval(axes, row, numbers, style.VERMILLION if source == "all latents" else latent)
        chance = 100 * next(iter(found.values())).chance
        axes.axvline(chance, color=style.BLACK, linestyle="--", linewidth=1)
        named = f"{question} (commonest answer {chance:.0f} %)"
        axes.set(title=named, xlabel=f"accuracy on unseen {unit}, %", xlim=(0, 102))
        axes.grid(axis="x")
    style.name_rows(shown[0], list(sources))
    return figure
