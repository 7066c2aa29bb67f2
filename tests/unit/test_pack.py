"""Packing: properties of the bins, of the plan of an epoch, and the schedule of the passes against a slow walk."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mirage_ds.data.pack import Planner, pack, schedule, total_steps
from mirage_ds.errors import UserError

worlds = st.integers(1, 5)
limits = st.none() | st.integers(1, 4)


def fewest_bins(lengths: list[int], capacity: int, most: int) -> int:
    """Fewest bins by trying every assignment (a new bin is interchangeable with any other new one)."""
    best = len(lengths)

    def place(at: int, bins: list[list[int]]) -> None:
        nonlocal best
        if len(bins) >= best and at < len(lengths):
            return
        if at == len(lengths):
            best = min(best, len(bins))
            return
        for one in bins:
            if sum(one) + lengths[at] <= capacity and len(one) < most:
                one.append(lengths[at])
                place(at + 1, bins)
                one.pop()
        bins.append([lengths[at]])
        place(at + 1, bins)
        bins.pop()

    place(0, [])
    return best


@given(st.lists(st.integers(1, 50), max_size=40), worlds, st.integers(0, 60), limits)
@example([], 3, 0, None)
@example([5], 4, 0, 1)
def test_every_row_lies_in_exactly_one_of_g_times_w_bins_and_no_limit_is_broken(
    lengths: list[int], world: int, slack: int, most: int | None
) -> None:
    capacity = max(lengths, default=1) + slack
    bins = pack(lengths, world, capacity, most)
    assert sorted(row for one in bins for row in one) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in one) <= capacity for one in bins)
    assert most is None or max(map(len, bins)) <= most
    assert bins
    assert len(bins) % world == 0
    assert pack(lengths, world, capacity, most) == bins


@given(st.lists(st.integers(1, 10), max_size=7), worlds, st.integers(0, 6))
@example([4, 4, 3, 3, 3, 3], 1, 6)
def test_bins_stay_within_first_fit_decreasings_bound_of_the_fewest(lengths: list[int], world: int, slack: int) -> None:
    """Dósa 2007: never more than 11/9 of the fewest bins plus 6/9; one row a bin is exact."""
    capacity = max(lengths, default=1) + slack
    bound = (11 * fewest_bins(lengths, capacity, 99) + 6) // 9
    assert len(pack(lengths, world, capacity)) <= max(1, ceil(bound / world)) * world
    assert len(pack(lengths, world, capacity, 1)) == max(1, ceil(len(lengths) / world)) * world


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), worlds)
def test_with_room_for_all_the_fullest_bin_exceeds_the_mean_by_less_than_its_last_row(
    lengths: list[int], world: int
) -> None:
    """Longest-first onto the emptiest bin: no bin was above the mean when its last (shortest) row came."""
    loads = [sorted(lengths[row] for row in one) for one in pack(lengths, world, sum(lengths))]
    assert len(loads) == world
    fullest = max(loads, key=sum)
    assert sum(fullest) - fullest[0] <= sum(lengths) / world


def test_a_row_longer_than_a_bin_is_refused_with_its_flag() -> None:
    with pytest.raises(UserError, match="a row of 9 tokens does not fit into --micro_batch_tokens 8"):
        pack([3, 9], 1, 8)


def planner(
    rows: int, batch: int, seed: int = 42, world: int = 2, tokens: int = 100, most: int | None = None
) -> Planner:
    # Dataset rows are not consecutive: the dropped ones are missing.
    return Planner(np.arange(rows) % 37 + 1, np.arange(rows) * 3 + 5, batch, world, tokens, most, seed)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31), st.integers(0, 30), worlds, limits)
def test_the_rows_of_a_step_depend_on_seed_and_epoch_alone(
    rows: int, batch: int, seed: int, step: int, world: int, most: int | None
) -> None:
    plan = planner(rows, batch, seed).plan(step)
    other = planner(rows, batch, seed, world, 37, most).plan(step)
    assert sorted(plan.rows) == sorted(other.rows)
    assert len(plan.rows) == batch
    assert {len(micro) for micro in other.bins} == {world}
    assert other.micro_steps == len(other.bins)
    assert (plan.step, other.step) == (step, step)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 100), st.integers(0, 3))
def test_every_epoch_holds_each_row_once_wherever_its_steps_end(rows: int, batch: int, seed: int, epoch: int) -> None:
    plans = planner(rows, batch, seed)
    steps = ceil((epoch + 1) * rows / batch)
    stream = [place for step in range(steps) for place in plans.rows_of(step)]
    assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert sorted(plans.plan(steps - 1).rows) == sorted(3 * place + 5 for place in plans.rows_of(steps - 1))


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = {tuple(planner(50, 50, seed).rows_of(epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 6


def test_the_planned_lengths_are_those_of_the_rows() -> None:
    """Every bin of the plan holds the capacity when counted by dataset row."""
    plans = planner(30, 12, tokens=40)
    tokens = dict(zip(plans.row_ids.tolist(), plans.lengths.tolist(), strict=True))
    for step in range(5):
        bins = [one for micro in plans.plan(step).bins for one in micro]
        assert max(sum(tokens[row] for row in one) for one in bins) <= 40


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 300))
@example(100, 10, 11)
def test_total_steps_is_the_exact_quotient_rounded_up(rows: int, batch: int, tenths: int) -> None:
    steps = total_steps(rows, batch, tenths / 10)
    assert steps == ceil(Fraction(tenths, 10) * rows / batch)
    assert total_steps(rows, batch, tenths / 10, max_steps=7) == min(7, steps)


def test_a_run_has_at_least_one_step() -> None:
    assert total_steps(1, 100, 0.001) == 1


# A sample as (tokens before the first run, [(k, tokens between this run and the next or the end)]).
samples = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=2)),
    min_size=1,
    max_size=5,
)


def lay_out(sample: tuple[int, list[tuple[int, int]]]) -> tuple[int, list[tuple[int, int]], list[int]]:
    """(length, runs, pass of each token) of a sample."""
    length, runs, passes = sample[0], [], [0] * sample[0]
    number = 0
    for k, behind in sample[1]:
        runs.append((length, k))
        for _ in range(k):
            number += 1
            passes.append(number)
        passes += [number] * behind
        length += k + behind
    return length, runs, passes


@given(samples, st.integers(0, 2))
@example([(3, [])], 2)
@example([(1, [(4, 1), (4, 1)]), (5, [(2, 3)]), (2, [])], 0)
def test_every_token_runs_once_in_its_pass_and_sees_all_earlier_tokens_of_its_own_sample(
    made: list[tuple[int, list[tuple[int, int]]]], spare: int
) -> None:
    laid = [lay_out(sample) for sample in made]
    lengths, runs, passes = zip(*laid, strict=True)
    sample_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    pass_of = [number for one in passes for number in one]
    start = np.concatenate([[0], np.cumsum(lengths)])
    count = max(pass_of) + 1 + spare
    plans = schedule(lengths, runs, count)
    assert len(plans) == count
    key_order: list[int] = []
    for number, plan in enumerate(plans):
        tokens = plan.tokens.tolist()
        assert tokens == [token for token in range(len(pass_of)) if pass_of[token] == number]
        key_order += tokens
        keys = [key_order[key] for key in plan.keys]
        query_at = key_at = 0
        for place, (queries, visible) in enumerate(zip(plan.query_lengths, plan.key_lengths, strict=True)):
            mine = tokens[query_at : query_at + queries]
            assert len({sample_of[token] for token in mine}) == 1
            for i, token in enumerate(mine):
                # A causal mask aligned bottom-right.
                seen = keys[key_at : key_at + visible - queries + i + 1]
                assert seen == list(range(start[sample_of[token]], token + 1))
            if number:
                previous = plans[number - 1].tokens
                assert previous[plan.sources[place]] == mine[0] - 1
            query_at, key_at = query_at + queries, key_at + visible
        assert (query_at, key_at) == (len(tokens), len(keys))
        assert len(plan.sources) == (len(plan.query_lengths) if number else 0)
    assert sorted(key_order) == list(range(len(pass_of)))


def test_latents_fed_in_a_pass_are_the_first_tokens_of_their_samples_and_no_others() -> None:
    """Three samples by hand: one run of 2 at 3, none, one run of 1 at 1."""
    plans = schedule([6, 2, 3], [[(3, 2)], [], [(1, 1)]], 3)
    assert [plan.tokens.tolist() for plan in plans] == [[0, 1, 2, 6, 7, 8], [3, 9, 10], [4, 5]]
    assert [plan.query_lengths for plan in plans] == [[3, 2, 1], [1, 2], [2]]
    assert [plan.key_lengths for plan in plans] == [[3, 2, 1], [4, 3], [6]]
    assert [plan.sources.tolist() for plan in plans] == [[], [2, 5], [0]]
    assert [plan.keys.tolist() for plan in plans] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 5, 7, 8], [0, 1, 2, 6, 9, 10]]


@pytest.mark.parametrize(("runs", "needed"), [([[(2, 3)]], 4), ([[(2, 1), (5, 2)]], 4)])
def test_too_few_passes_raise(runs: list[list[tuple[int, int]]], needed: int) -> None:
    assert len(schedule([9], runs, needed)) == needed
    with pytest.raises(ValueError, match=f"needs {needed} passes, the run has {needed - 1}"):
        schedule([9], runs, needed - 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_reached_rows_are_those_of_the_steps(steps: int) -> None:
    ids = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])
    planner = Planner(np.full(10, 5), ids, 3, 2, 100, None, 42)
    taken = {row for step in range(steps) for row in planner.plan(step).rows}
    assert planner.reached(steps) == sorted(taken)
