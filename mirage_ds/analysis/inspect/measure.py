"""Numbers about vectors: cosines, nearest words, pooled targets, principal components.

n latents, F visual features, k latents a block, H hidden, V vocabulary, N vectors. All results are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from mirage_ds.config.run import Compress
from mirage_ds.data.pooling import DROPPED, pool_groups


class Words(NamedTuple):
    """The nearest words of each latent, best first: token ids (n, m) and their scores (n, m)."""

    ids: torch.Tensor
    scores: torch.Tensor


class Components(NamedTuple):
    """Principal components: mean (H,), directions (c, H) of length 1, and each one's share (c,) of the variance."""

    mean: torch.Tensor
    directions: torch.Tensor
    share: torch.Tensor

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """Coordinates (N, c) of vectors (N, H)."""
        return (vectors.float() - self.mean) @ self.directions.T


def cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of each vector of `one` (n, H) with each of `other` (F, H) → (n, F)."""
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
    return Words(ids, scores)


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
    return Words(ids, scores)


def targets(features: torch.Tensor, k: int, columns: int, compress: Compress = "average") -> torch.Tensor:
    """Average a helper's features (F, H), in rows of so many columns, into k targets (k, H), as stage 1 does."""
    groups = torch.from_numpy(pool_groups(len(features) // columns, columns, k, compress)).to(features.device)
    kept = groups != DROPPED
    sums = torch.zeros(k, features.shape[1], device=features.device).index_add(0, groups[kept], features[kept].float())
    return sums / groups[kept].bincount()[:, None]


def components(vectors: torch.Tensor, count: int = 2) -> Components:
    """Find the `count` directions of greatest variance of vectors (N, H).

    The sign of a direction is chosen: its entry of greatest magnitude is positive, so that pictures do not flip.
    """
    vectors = vectors.double()
    mean = vectors.mean(0)
    # H × H, not N × H: what is kept does not grow with the file.
    values, directions = torch.linalg.eigh((vectors - mean).T @ (vectors - mean))
    values, directions = values.flip(0).clamp(min=0), directions.flip(1).T[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    share = values[:count] / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return Components(mean.float(), (directions * largest.sign()).float(), share.float())
