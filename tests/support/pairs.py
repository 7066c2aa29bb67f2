"""Few cases of many."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import TypeVar

Case = TypeVar("Case", bound=Sequence[Hashable])


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """Return some of the cases: each two values that stand together in any of them still do. Greedy, not the fewest."""
    found = {case: set(combinations(enumerate(case), 2)) for case in cases}
    left = set().union(*found.values())
    chosen = []
    while left:
        chosen.append(max(found, key=lambda case: len(found[case] & left)))
        left -= found[chosen[-1]]
    return sorted(chosen, key=list(found).index)
