"""All numbers of one latent block.

T tokens of a row, k latents of the block, Q tokens of the answer behind it, F merged features of an image (rows ×
columns of them), m words, H hidden, L layers, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect import measure
from mirage_ds.analysis.inspect.run import Thought, attention
from mirage_ds.data.encode import IMAGE_PAD, Encoder
from mirage_ds.data.record import Record
from mirage_ds.model.images import embedded

# What a token of the answer can look at, in the order of Look.shares.
PARTS = ("images", "text before", "latents", "text behind")
# m.
WORDS = 6


class Seen(NamedTuple):
    """An image: its name, picture (height, width, 3) uint8, and features (rows, columns, H)."""

    name: str
    picture: np.ndarray
    features: torch.Tensor


class Look(NamedTuple):
    """One latent block.

    Attributes:
        title: which row, which block, who made the latents.
        similarity: for each image (name, picture, (k, rows, columns) cosines to its features).
        nearest, lens: words of each latent by cosine and by the head; their texts are `spellings`.
        norms: (k,) of the latents; word_norms: (V,) of the input embeddings; feature_norms: (F,) of the input images'
            features.
        to_targets: (k, k) cosine of each latent (row) to each target of the helper (column); None without helper.
        attention: (L, Q, k) from the answer's tokens to the latents, mean over heads.
        shares: (L, 4) what the answer's tokens give to each of PARTS, mean over tokens; rows sum to 1. Earlier
            blocks are text before.
        uniform: what the latents would get on average if every visible token got the same.
        answer: Q spellings of the answer's tokens.
    """

    title: str
    similarity: list[tuple[str, np.ndarray, torch.Tensor]]
    nearest: measure.Words
    lens: measure.Words
    spellings: dict[int, str]
    norms: torch.Tensor
    word_norms: torch.Tensor
    feature_norms: torch.Tensor
    to_targets: torch.Tensor | None
    attention: torch.Tensor
    shares: torch.Tensor
    uniform: float
    answer: list[str]


def spell(encoder: Encoder, token: int) -> str:
    """Write a token so that spaces and line ends show."""
    text = str(encoder.tokenizer.decode([token]))
    if not text or "\ufffd" in text:
        # Part of a character, or a row of the matrix that belongs to no token.
        text = str(encoder.tokenizer.convert_ids_to_tokens(token) or f"[{token}]")
    return text.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")


def see(bench: Bench, record: Record, thought: Thought) -> tuple[list[Seen], list[Seen]]:
    """Open a row's images: the input images with the features that the model got, and the helpers with theirs.

    Raises:
        RecordError: a helper image is missing or does not decode.
    """
    encoder, device = bench.encoder, thought.inputs.device
    inputs: list[Seen] = []
    helpers: list[Seen] = []
    left = thought.images
    for name, path in record.images(helpers=True):
        pixels, grid = encoder.pixels(record, name, [path])
        rows, columns = encoder.sides(grid[0].tolist())
        picture = np.asarray(encoder.finder.load(record, name, path))
        if name == "image_input":
            own, left = left[: rows * columns], left[rows * columns :]
            number = f" {len(inputs) + 1}" if len(record.image_input) > 1 else ""
            inputs.append(Seen(f"input image{number}", picture, own.unflatten(0, (rows, columns))))
        else:
            own = embedded(bench.tower.features(pixels.to(device), grid.to(device)), thought.inputs.shape[1])
            helpers.append(Seen("helper image", picture, own.unflatten(0, (rows, columns))))
    return inputs, helpers


def _shares(encoder: Encoder, thought: Thought, block: int, rows: torch.Tensor) -> torch.Tensor:
    """Sum attention (L, Q, T) over the four PARTS and average over tokens → (L, 4)."""
    places = torch.arange(len(thought.ids))
    start, k = thought.runs[block]
    before, behind = places < start, places >= start + k
    image = thought.ids == encoder.id_of(IMAGE_PAD)
    parts = (image, before & ~image, ~before & ~behind, behind)
    return torch.stack([rows[..., part].sum(-1).mean(1) for part in parts], dim=-1)


def look(bench: Bench, thought: Thought, block: int, images: Sequence[Seen], helper: Seen | None, title: str) -> Look:
    """Measure one latent block.

    Args:
        block: its number in the row, from 0.
        images, helper: the row's input images and the block's own helper, see `see`.
    """
    model, encoder = bench.model, bench.encoder
    latents = thought.latents[block]
    start, k = thought.runs[block]
    matrix, embeddings = (one.weight.detach() for one in (model.head, model.language_model.embed_tokens))
    words_known = len(encoder.tokenizer)
    nearest = measure.nearest(latents, matrix[:words_known], WORDS)
    lens = measure.lens(latents, matrix, WORDS)
    queries = thought.answer(block)
    probabilities = attention(model, thought, queries)
    to_targets = None
    if helper:
        targets = measure.targets(helper.features, k, encoder.compress)
        to_targets = measure.cosines(latents, targets).cpu()
    return Look(
        title=title,
        similarity=[
            (one.name, one.picture, measure.cosines(one.features, latents).movedim(-1, 0).cpu())
            for one in [*images, *([helper] if helper else [])]
        ],
        nearest=measure.Words(*(part.cpu() for part in nearest)),
        lens=measure.Words(*(part.cpu() for part in lens)),
        spellings={token: spell(encoder, token) for token in torch.cat([nearest.ids, lens.ids]).unique().tolist()},
        norms=latents.float().norm(dim=-1).cpu(),
        word_norms=embeddings[:words_known].float().norm(dim=-1).cpu(),
        feature_norms=thought.images.float().norm(dim=-1).cpu(),
        to_targets=to_targets,
        attention=probabilities[..., start : start + k],
        shares=_shares(encoder, thought, block, probabilities),
        uniform=float((k / (queries + 1).float()).mean()),
        answer=[spell(encoder, token) for token in thought.ids[queries].tolist()],
    )
