"""The plan of passes against whole passes from nothing, on symbols in place of states.

A key is the token with its input; a state is the tuple of the keys that it has seen, its own last. Two states are one
symbol only if all that went into them is the same.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from mirage_ds.data.passes import PassPlan, schedule

Runs = list[tuple[int, int]]


class Symbols(dict):
    """Short names of what is seen; the same for the same."""

    def of(self, *seen: Any) -> int:
        return self.setdefault(seen, len(self))


def row(rng: random.Random, k: int) -> tuple[int, Runs]:
    """A row's length and its blocks, which may be neighbours."""
    at, runs = rng.randint(1, 4), []
    for _ in range(rng.randint(0, 3)):
        runs.append((at, k))
        at += k + rng.randint(0, 3)
    return at + rng.randint(1, 3), runs


def walked(plans: list[PassPlan], symbols: Symbols) -> dict[int, int]:
    """Packed token → its state in the last pass that runs it."""
    keys_made: list[int] = []
    last: dict[int, int] = {}
    before: list[int] = []
    for plan in plans:
        tokens = plan.tokens.tolist()
        inputs = [("embedding", token) for token in tokens]
        for place, source in zip(plan.fed.tolist(), plan.sources.tolist(), strict=True):
            inputs[place] = ("state", before[source])
        mine = [symbols.of(token, given) for token, given in zip(tokens, inputs, strict=True)]
        keys_made += mine
        keys, asked, states = [keys_made[i] for i in plan.keys.tolist()], iter(mine), list[int]()
        for queries, seen in zip(plan.query_lengths, plan.key_lengths, strict=True):
            own, keys = keys[:seen], keys[seen:]
            for query in range(queries):
                # As attention has it: the last query sees the last key.
                visible = own[: seen - queries + query + 1]
                assert visible[-1] == next(asked)
                states.append(symbols.of(*visible))
        last |= zip(tokens, states, strict=True)
        before = states
    return last


def from_nothing(
    start: int, length: int, runs: Runs, together: int | None, symbols: Symbols, hidden: list[int]
) -> list[int]:
    """The states of one row: the whole row anew for each latent, or for each pass of a block."""
    latents = [at for p, k in runs for at in range(p, p + k)]

    def states(inputs: list[Any]) -> list[int]:
        keys = [symbols.of(start + place, given) for place, given in enumerate(inputs)]
        blind = [place > min(latents, default=length) and place not in latents for place in range(len(inputs))]
        return [
            symbols.of(*(key for at, key in enumerate(keys[: place + 1]) if not (blind[place] and at in hidden)))
            for place in range(len(inputs))
        ]

    inputs: list[Any] = [("embedding", start + place) for place in range(length)]
    for p, k in runs:
        if together is None:
            for at in range(p, p + k):
                inputs[at] = ("state", states(inputs[:at])[-1])
        else:
            for _ in range(together):
                found = states(inputs[: p + k])
                inputs[p : p + k] = [("state", found[at - 1]) for at in range(p, p + k)]
    return states(inputs)


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("together", [None, 0, 1, 2, 3, 4, 6])
def test_states_of_last_runs_are_those_of_whole_passes(together: int | None, hides: bool) -> None:
    rng = random.Random(str(together))
    for _ in range(60):
        k = rng.randint(1, 4)
        rows = [row(rng, k) for _ in range(rng.randint(1, 4))]
        added = k if together is None else min(k, together)
        passes = 1 + added * max(len(runs) for _, runs in rows)
        # Of the places before the first block, some.
        firsts = [runs[0][0] if runs else length for length, runs in rows]
        hidden = [rng.sample(range(first), rng.randint(0, first)) if hides else [] for first in firsts]
        lengths, blocks = zip(*rows, strict=True)
        plans, symbols = schedule(lengths, blocks, passes, together, hidden), Symbols()
        assert len(plans) == passes
        last, start = walked(plans, symbols), 0
        for (length, runs), unseen in zip(rows, hidden, strict=True):
            wanted = from_nothing(start, length, runs, together, symbols, unseen)
            assert [last[start + place] for place in range(length)] == wanted
            start += length


def test_as_many_passes_as_latents_give_the_states_of_the_recurrence() -> None:
    lengths, runs, symbols = [12, 9, 4], [[(3, 3), (6, 3)], [(2, 3)], []], Symbols()
    in_turn, *others = (walked(schedule(lengths, runs, 7, together), symbols) for together in (None, 3, 5))
    assert in_turn == others[0] == others[1]
    assert in_turn != walked(schedule(lengths, runs, 5, 2), symbols)


def test_too_few_passes_are_an_error() -> None:
    with pytest.raises(ValueError, match="a sample needs 5 passes, there are 4"):
        schedule([12], [[(3, 3), (7, 3)]], 4, 2)
