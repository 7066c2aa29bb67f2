"""How alike latents are: mutual cosines, shares of variance, effective rank; and in one sentence.

N rows, k latents of a row's first block, H hidden, n = N · k vectors. All is computed in float64.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

# n, at most, so that arms of different k are compared on as many: the effective rank grows with n, its cost as n³.
MOST_VECTORS = 1024
# Of the vectors' squared lengths: a variance below it is float32's rounding.
ROUNDING = 1e-12
# From these mean cosines on latents are called nearly alike, or partly.
DEGREES = {"nearly alike": 0.8, "partly alike": 0.5, "unlike": -1.1}
MEANING = dict(zip(DEGREES, ("little of them depends", "part of them depends", "they depend"), strict=True))
# LATENT_MEASURES in words.
LABELS = {
    "cosine_within": "mean cosine of the latents of one row",
    "cosine_between": "mean cosine of latents at the same slot of different rows",
    "share_between": "share of the variance that lies between rows",
    "share_slots": "share of the variance that lies between slots",
    "effective_rank": "effective rank",
}


def rows_of(k: int) -> int:
    """Return how many rows of k latents are measured, at most: the first ones."""
    return max(2, MOST_VECTORS // k)


def _mutual(units: torch.Tensor) -> float:
    """Mean dot product of two different ones of the B vectors of a group, over all A groups of `units` (A, B, H)."""
    count = units.shape[1]
    # ‖Σ u‖² holds each pair twice, and each vector with itself.
    pairs = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return float(pairs.mean() / (count * (count - 1)))


def effective_rank(vectors: torch.Tensor) -> float:
    """Return exp(−Σ p log p), p = σ / Σ σ, of the singular values σ of vectors (n, H), not centred; 1 ≤ it ≤ min(n, H).

    Roy and Vetterli, The effective rank (EUSIPCO 2007). The squares of σ are the eigenvalues of the smaller Gram
    matrix; those at its rounding count as none.
    """
    vectors = vectors.double()
    values = torch.linalg.eigvalsh(vectors @ vectors.T if len(vectors) <= vectors.shape[1] else vectors.T @ vectors)
    sigma = values[values > len(values) * torch.finfo(values.dtype).eps * values[-1]].sqrt()
    p = sigma / sigma.sum()
    return float((-(p * p.log()).sum()).exp())


def measures(latents: torch.Tensor) -> dict[str, float]:
    """Measure how alike latents z (N, k, H) are.

    With u = z / ‖z‖ (0 of a zero vector) and a bar for a mean, cosine_within is the mean of u_ni · u_nj over rows n and
    slots i ≠ j, cosine_between that of u_ni · u_mi over slots i and rows n ≠ m. The shares are those of the analysis of
    variance by row and slot: share_between is k Σ_n ‖z̄_n − z̄‖² / Σ_ni ‖z_ni − z̄‖², share_slots N Σ_i ‖z̄_i − z̄‖²
    over the same; what both leave differs by row at single slots. 0 where nothing varies. effective_rank is that of all
    N · k vectors.

    Returns:
        Each of config.run.LATENT_MEASURES, in this order; no cosine_within where k = 1, no cosine_between where N = 1,
        and nothing where a number is not finite.
    """
    z = latents.double()
    rows, k, _ = z.shape
    if not z.isfinite().all():
        return {}
    units = functional.normalize(z, dim=-1)
    found = {"cosine_within": _mutual(units)} if k > 1 else {}
    if rows > 1:
        found["cosine_between"] = _mutual(units.transpose(0, 1))
    mean = z.mean((0, 1))
    total = float((z - mean).square().sum())
    varies = total > ROUNDING * float(z.square().sum())
    for name, axis, each in (("share_between", 1, k), ("share_slots", 0, rows)):
        found[name] = each * float((z.mean(axis) - mean).square().sum()) / total if varies else 0.0
    return {**found, "effective_rank": effective_rank(z.flatten(0, 1))}


def degree(cosine: float) -> str:
    """Say how alike vectors of this mean cosine are."""
    return next(name for name, least in DEGREES.items() if cosine >= least)


def sentence(found: Mapping[str, float]) -> str:
    """Say in one sentence what `measures` found; nothing where it found no cosine."""
    parts = []
    if (between := found.get("cosine_between")) is not None:
        how = degree(between)
        parts.append(f"different rows are {how} (mean cosine {between:.2f}): {MEANING[how]} on the row")
    if (within := found.get("cosine_within")) is not None:
        parts.append(f"one row are {degree(within)} ({within:.2f})")
    return f"Latents of {'; those of '.join(parts)}." if parts else ""


def by_degree(cosines: Mapping[str, float]) -> str:
    """Say in one sentence how alike latents of different rows are, by arm → mean cosine."""
    groups = {how: [f"{arm} ({one:.2f})" for arm, one in cosines.items() if degree(one) == how] for how in DEGREES}
    said = [f"{how} in {', '.join(arms)}" for how, arms in groups.items() if arms]
    return f"Latents of different rows are {'; '.join(said)}." if said else ""
