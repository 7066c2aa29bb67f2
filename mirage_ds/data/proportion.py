"""How many rows each source of a mixture gives. Imports no torch.

S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirage_ds.config.mixture import apportion
from mirage_ds.errors import UserError


def shares(files: Sequence[Path], count: int, weights: Sequence[float]) -> list[int]:
    """Split `count` rows by the weights.

    Raises:
        UserError: a source gets none.
    """
    counts = apportion(count, weights)
    for file, share in zip(files, counts, strict=True):
        if not share:
            raise UserError(f"{file}: gets no row in a mixture of {count}; raise its weight or --count")
    return counts


def most(files: Sequence[Path], lengths: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Count the rows of each source in the largest mixture of these weights that takes no row twice.

    Args:
        lengths: (S,) rows that there are.

    Raises:
        UserError: a source gets none.
    """
    total = min(length / weight for length, weight in zip(lengths, weights, strict=True)) * sum(weights)
    return shares(files, int(total + 1e-9), weights)
