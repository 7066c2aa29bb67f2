"""The suite's own choice of cases."""

from __future__ import annotations

from itertools import product

from support.pairs import pairwise


def test_each_two_values_that_stand_together_still_do() -> None:
    cases = [case for case in product("abc", (1, 2), "xyz", (True, False)) if case[:2] != ("c", 2)]
    chosen = pairwise(cases)
    assert len(chosen) < len(cases) / 2
    assert chosen == [case for case in cases if case in chosen]
    for i in range(4):
        for j in range(i):
            assert {(case[i], case[j]) for case in chosen} == {(case[i], case[j]) for case in cases}
