"""Numbers about vectors: cosines, nearest words, pooled targets, principal components.

n latents, k latents a block, H hidden, V vocabulary, N vectors, c components. All results are float32.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from mirage_ds.config.run import Compress
from mirage_ds.data.pooling import DROPPED, pool_groups


class Words(NamedTuple):
    """The nearest words of each latent, best first: token ids (n, m) and their scores (n, m), on the CPU."""

    ids: torch.Tensor
    scores: torch.Tensor


def cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of each vector of `one` (…, H) with each of `other` (n, H) → (…, n)."""
    return functional.normalize(one.float(), dim=-1) @ functional.normalize(other.float(), dim=-1).T


def nearest(latents: torch.Tensor, matrix: torch.Tensor, count: int) -> Words:
    """Find the words whose output vectors point most nearly where a latent points.

    Args:
        latents: (n, H); matrix: (V, H) output vectors, without rows that belong to no token.
        count: m, words a latent.

    Returns:
        Words with cosines.
    """
    scores, ids = cosines(latents, matrix).topk(min(count, len(matrix)), dim=-1)
    return Words(ids.cpu(), scores.cpu())


def lens(latents: torch.Tensor, matrix: torch.Tensor, count: int) -> Words:
    """Read a latent as the head would: the words it would emit there, had it not been fed back.

    Args:
        latents: (n, H) final-norm hidden states; matrix: (V, H), every row the head has.
        count: m, words a latent.

    Returns:
        Words with probabilities.
    """
    logits = functional.linear(latents.to(matrix.dtype), matrix).float()
    scores, ids = logits.softmax(-1).topk(min(count, len(matrix)), dim=-1)
    return Words(ids.cpu(), scores.cpu())


def targets(features: torch.Tensor, k: int, compress: Compress = "average") -> torch.Tensor:
    """Average a helper's features (rows, columns, H) into k targets (k, H), as stage 1 does."""
    rows, columns, width = features.shape
    groups = torch.from_numpy(pool_groups(rows, columns, k, compress)).to(features.device)
    kept = groups != DROPPED
    own = features.flatten(0, 1)[kept].float()
    sums = torch.zeros(k, width, device=features.device).index_add(0, groups[kept], own)
    return sums / groups[kept].bincount()[:, None]


def components(vectors: torch.Tensor, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay vectors (N, H) on the `count` directions of greatest variance.

    The sign of a direction is chosen: its entry of greatest magnitude is positive, so that pictures do not flip.

    Returns:
        Coordinates (N, c), and each direction's share (c,) of the variance.
    """
    centred = vectors.double() - vectors.double().mean(0)
    # H × H, not N × H: what is kept does not grow with the file.
    values, directions = torch.linalg.eigh(centred.T @ centred)
    values, directions = values.flip(0).clamp(min=0), directions.flip(1).T[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    share = values[:count] / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return (centred @ (directions * largest.sign()).T).float(), share.float()


class Projection(NamedTuple):
    """Vectors on two principal components: kind → (·, 2) coordinates, and each component's share of the variance."""

    points: dict[str, torch.Tensor]
    share: torch.Tensor


def project(kinds: dict[str, torch.Tensor], unit: bool) -> Projection:
    """Lay all kinds of vectors on the two components of greatest variance of them together.

    Args:
        unit: bring each vector to length 1 first, so that directions alone matter.
    """
    if unit:
        kinds = {name: functional.normalize(vectors.float(), dim=-1) for name, vectors in kinds.items()}
    points, share = components(torch.cat(list(kinds.values())))
    each = points.split([len(vectors) for vectors in kinds.values()])
    return Projection(dict(zip(kinds, each, strict=True)), share)
