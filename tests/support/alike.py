"""How alike latents are, by plain loops: what analysis.alike and all that shows its numbers are compared with.

N rows, k latents a row, H hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def mean_of(vectors: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def squared(one: Sequence[float], other: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def slowly(latents: torch.Tensor) -> dict[str, float]:
    """What alike.measures returns of (N, k, H), N and k > 1, by Python loops; the rank by numpy's singular values."""
    z = latents.double().tolist()
    rows, k = range(len(z)), range(len(z[0]))
    within = [cosine(z[n][i], z[n][j]) for n in rows for i, j in itertools.combinations(k, 2)]
    between = [cosine(z[n][i], z[m][i]) for i in k for n, m in itertools.combinations(rows, 2)]
    every = [z[n][i] for n in rows for i in k]
    middle = mean_of(every)
    total = sum(squared(one, middle) for one in every)
    by_row = sum(squared(mean_of(z[n]), middle) for n in rows for _ in k)
    by_slot = sum(squared(mean_of([z[n][i] for n in rows]), middle) for i in k for _ in rows)
    sigma = np.linalg.svd(np.array(every), compute_uv=False)
    shares = [one / sum(sigma) for one in sigma if one > 0]
    return {
        "cosine_within": sum(within) / len(within),
        "cosine_between": sum(between) / len(between),
        "share_between": by_row / total,
        "share_slots": by_slot / total,
        "effective_rank": math.exp(-sum(p * math.log(p) for p in shares)),
    }
