"""Packing: properties of the bins, of the plan of an epoch, and the schedule of the passes against a slow walk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain, product
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.packing import fill
from mirage_ds.data import pack as packing
from mirage_ds.data.encode import Encoder
from mirage_ds.data.pack import Bins, Planner, pack, total_steps
from mirage_ds.data.passes import schedule
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError

SAMPLE = Path(__file__).parents[3] / "data/sample.jsonl"
CAPACITY = 8192

worlds = st.integers(1, 5)
limits = st.none() | st.integers(1, 4)


def fewest_bins(
    lengths: list[int], capacity: int, most: int, patches: list[int] | None = None, patch_capacity: int = 0
) -> int:
    """Fewest bins by trying every assignment (a new bin is interchangeable with any other new one)."""
    best = len(lengths)
    patches = patches or [0] * len(lengths)

    def place(at: int, bins: list[list[int]]) -> None:
        nonlocal best
        if len(bins) >= best and at < len(lengths):
            return
        if at == len(lengths):
            best = min(best, len(bins))
            return
        for one in bins:
            fits = sum(lengths[row] for row in one) + lengths[at] <= capacity
            fits = fits and sum(patches[row] for row in one) + patches[at] <= patch_capacity
            if fits and len(one) < most:
                one.append(at)
                place(at + 1, bins)
                one.pop()
        bins.append([at])
        place(at + 1, bins)
        bins.pop()

    place(0, [])
    return best


@given(st.lists(st.integers(1, 50), max_size=40), worlds, st.integers(0, 60), limits)
@example([], 3, 0, None)
@example([5], 4, 0, 1)
# The two bins of two rows with room for all are 20 + 1, one too many, and 11 + 2.
@example([2, 11, 20, 1], 2, 0, 2)
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


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 3))
@example([3, 3, 2, 2, 2], 2)
def test_with_room_for_all_the_fullest_bin_is_within_grahams_bound_of_the_best(lengths: list[int], world: int) -> None:
    """Graham 1969: longest-first is at most 4/3 − 1/(3W) of the best; exchanges can only lower it."""
    best = min(
        max(sum(n for n, rank in zip(lengths, ranks, strict=True) if rank == one) for one in range(world))
        for ranks in product(range(world), repeat=len(lengths))
    )
    fullest = max(sum(lengths[row] for row in one) for one in pack(lengths, world, sum(lengths)))
    assert best <= fullest
    assert 3 * world * fullest <= (4 * world - 1) * best


def test_small_steps_have_the_fewest_micro_steps() -> None:
    """Of 300 steps of up to 8 rows, with and without limits of patches and rows, all but 1 %."""
    random, above = np.random.default_rng(0), 0
    for case in range(300):
        rows, world = int(random.integers(1, 9)), int(random.integers(1, 4))
        lengths, patches = random.integers(1, 51, rows).tolist(), random.integers(0, 41, rows).tolist()
        capacity = max(lengths) + int(random.integers(0, 70))
        patch_capacity = max(1, *patches) + int(random.integers(0, 60)) if case % 2 else None
        most = 3 if case % 3 == 0 else None
        bins = pack(lengths, world, capacity, most, patches, patch_capacity)
        fewest = fewest_bins(lengths, capacity, most or rows, patches, patch_capacity or sum(patches))
        assert len(bins) // world >= ceil(fewest / world)
        above += len(bins) // world > ceil(fewest / world)
    assert above <= 3


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 90)), max_size=40), worlds, st.integers(0, 99), limits)
@example([(1, 90), (50, 0), (1, 90), (50, 0)], 1, 10, None)
def test_no_bin_has_more_patches_than_its_limit(
    rows: list[tuple[int, int]], world: int, slack: int, most: int | None
) -> None:
    lengths, patches = [row[0] for row in rows], [row[1] for row in rows]
    capacity, patch_capacity = max(lengths, default=1) + 60, max([1, *patches]) + slack
    bins = pack(lengths, world, capacity, most, patches, patch_capacity)
    assert sorted(row for one in bins for row in one) == list(range(len(rows)))
    assert all(sum(patches[row] for row in one) <= patch_capacity for one in bins)
    assert all(sum(lengths[row] for row in one) <= capacity for one in bins)
    assert most is None or max(map(len, bins)) <= most
    assert len(bins) % world == 0
    assert pack(np.array(lengths, int), world, capacity, most, np.array(patches, int), patch_capacity) == bins


def test_patches_decide_where_tokens_leave_room() -> None:
    """Four rows of 10 tokens, two of them with an image: one bin by tokens, two by images, one image in each."""
    assert len(pack([10] * 4, 1, 40, None, [8, 0, 8, 0], 16)) == 1
    bins = pack([10] * 4, 1, 40, None, [8, 0, 8, 0], 15)
    assert [sum([8, 0, 8, 0][row] for row in one) for one in bins] == [8, 8]


def test_tokens_are_evened_out_where_patches_are_the_fuller() -> None:
    """Long and short rows with many and few patches: 110 tokens each, though the patches are then 18 and 2 of 20."""
    bins = pack([100, 100, 10, 10], 2, 1000, None, [1, 9, 9, 1], 20)
    assert sorted(sorted(one) for one in bins) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), worlds, st.integers(0, 60))
def test_bins_of_like_load_share_a_micro_step(lengths: list[int], world: int, slack: int) -> None:
    loads = [sum(lengths[row] for row in one) for one in pack(lengths, world, max(lengths) + slack)]
    assert loads == sorted(loads, reverse=True)


def passes_of(bins: Bins, passes: np.ndarray, world: int) -> list[int]:
    """Passes of each micro-step: its row of most decides."""
    micros = [list(chain.from_iterable(bins[at : at + world])) for at in range(0, len(bins), world)]
    return [int(passes[micro].max(initial=0)) for micro in micros]


@given(
    st.lists(st.tuples(st.integers(1, 100), st.sampled_from([1, 5, 5, 9, 17]), st.integers(0, 40)), max_size=40),
    worlds,
    limits,
)
def test_rows_of_many_passes_come_together_within_all_limits_where_that_costs_less(
    rows: list[tuple[int, int, int]], world: int, most: int | None
) -> None:
    lengths, needs, images = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    alone = pack(lengths, world, 128, most, images, 50)
    together = pack(lengths, world, 128, most, images, 50, needs)
    assert sorted(chain.from_iterable(together)) == list(range(len(rows)))
    assert len(together) == len(alone)
    assert all(lengths[one].sum() <= 128 and images[one].sum() <= 50 for one in together)
    assert most is None or max(map(len, together)) <= most

    def cost(bins: Bins) -> int:
        loads = [int(lengths[one].sum()) for one in bins]
        slowest = sum(max(loads[at : at + world]) for at in range(0, len(bins), world))
        return slowest + packing.PASS_TOKENS * sum(passes_of(bins, needs, world))

    assert cost(together) <= cost(alone)


def test_a_step_of_mixed_rows_goes_through_few_passes_and_hardly_waits_longer() -> None:
    # One row in twenty has four blocks of four latents, the others one: 17 passes, and 5.
    draws = np.random.default_rng(0)
    lengths, needs = draws.integers(300, 2000, 512), np.where(draws.random(512) < 0.05, 17, 5)
    alone, together = (pack(lengths, 8, CAPACITY, passes=given) for given in (None, needs))
    assert passes_of(alone, needs, 8) == [17] * 10
    assert passes_of(together, needs, 8) == [17] + [5] * 9
    assert fill([together[at : at + 8] for at in range(0, 80, 8)], lengths, CAPACITY).balance > 0.98


def test_a_row_that_fits_into_no_bin_is_refused_with_its_flag() -> None:
    with pytest.raises(UserError, match="a row of 9 tokens does not fit into --micro_batch_tokens 8"):
        pack([3, 9], 1, 8)
    with pytest.raises(UserError, match="a row of 7 image patches does not fit into --micro_batch_patches 6"):
        pack([3, 9], 1, 9, None, [7, 6], 6)
    with pytest.raises(ValueError, match="needs the patches"):
        pack([3, 9], 1, 9, None, None, 6)


def test_too_many_patches_are_refused_before_the_first_step() -> None:
    given_rows: dict[str, Any] = dict(lengths=np.array([3, 4]), row_ids=np.array([5, 8]), rows_per_step=1, world_size=1)
    settings: dict[str, Any] = dict(micro_batch_tokens=9, micro_batch_size=None, seed=0, patches=np.array([4, 9]))
    assert Planner(**given_rows, **settings, micro_batch_patches=9).plan(0).rows
    with pytest.raises(
        UserError, match=r"^row 8 of the records \(from 0\) has 9 image patches, more than --micro_batch_p"
    ):
        Planner(**given_rows, **settings, micro_batch_patches=8)


def in_micro_steps(bins: Bins, world: int) -> list[Bins]:
    return [bins[at : at + world] for at in range(0, len(bins), world)]


def test_fill_counts_waiting_and_micro_steps_too_many() -> None:
    """By hand: W = 2, capacity 10; micro-steps of 10 and 6, 4 and 0 tokens. 20 of 2 · (10 + 4) are work."""
    plan = [[[0], [1, 2]], [[3], []]]
    lengths = {0: 10, 1: 5, 2: 1, 3: 4}
    assert fill(plan, [lengths[row] for row in range(4)], 10) == (20 / 28, 1 / 2)
    # 21 of 5 patches a bin: three micro-steps of two bins could be needed, were it not for the plan, which has two.
    assert fill([*plan, [[], []]], [10, 5, 1, 4], 10, [21, 0, 0, 0], 5) == (20 / 28, 3 / 3)
    assert fill(plan, [10, 5, 1, 4], 20).capacity == 1 / 2


@pytest.fixture(scope="module")
def vsp(encoder_for: Callable[..., Encoder]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and image patches of the VSP records that ship."""
    encoder = encoder_for(beside=SAMPLE)
    measures = [encoder.measure(record) for record in scan(SAMPLE)[0]]
    images = [sum(one.images) + sum(one.helpers) for one in measures]
    return np.array([one.tokens for one in measures]), encoder.images.merge_size**2 * np.array(images)


def steps_of(source: str, tokens: int, vsp: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and patches of the rows of 25 steps of about so many tokens."""
    random = np.random.default_rng(0)
    for _ in range(25):
        if source == "vsp":
            at = random.integers(0, len(vsp[0]), round(tokens / vsp[0].mean()))
            yield vsp[0][at], vsp[1][at]
        else:
            lengths = random.integers(50, 4001, round(tokens / 2025))
            yield lengths, np.zeros_like(lengths)


@pytest.mark.parametrize(
    ("world", "tokens"), [*product((1, 2, 8), (65_536, 32 * CAPACITY)), (32, 32 * CAPACITY), (32, 128 * CAPACITY)]
)
@pytest.mark.parametrize("source", ["vsp", "uniform"])
def test_steps_are_full(source: str, world: int, tokens: int, vsp: tuple[np.ndarray, np.ndarray]) -> None:
    found = []
    for lengths, _ in steps_of(source, tokens, vsp):
        found.append(fill(in_micro_steps(pack(lengths, world, CAPACITY), world), lengths, CAPACITY))
    assert np.mean(found, axis=0).min() >= 0.97


def test_rows_of_like_lengths_need_fewer_bins_than_first_fit_decreasing() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(529, 867, 4096))[::-1]
    first_fit: list[int] = []
    for length in lengths.tolist():
        place = next((at for at, full in enumerate(first_fit) if full + length <= CAPACITY), len(first_fit))
        first_fit[place : place + 1] = [length + sum(first_fit[place : place + 1])]
    least = ceil(lengths.sum() / CAPACITY)
    assert len(first_fit) >= 1.02 * least
    assert len(pack(lengths, 1, CAPACITY)) <= least + 1


def test_where_ranks_have_a_row_each_they_wait_for_the_longest_alone(vsp: tuple[np.ndarray, np.ndarray]) -> None:
    for lengths, _ in steps_of("uniform", 65_536, vsp):
        plan = in_micro_steps(pack(lengths, 32, CAPACITY), 32)
        assert fill(plan, lengths, CAPACITY) == (lengths.sum() / (32 * lengths.max()), 1)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_steps_are_full_where_patches_are_the_limit(world: int, vsp: tuple[np.ndarray, np.ndarray]) -> None:
    found = []
    for lengths, patches in steps_of("vsp", 32 * CAPACITY, vsp):
        limit = int(0.7 * CAPACITY * vsp[1].mean() / vsp[0].mean())
        plan = in_micro_steps(pack(lengths, world, CAPACITY, None, patches, limit), world)
        assert len(plan) > ceil(lengths.sum() / (world * CAPACITY))
        found.append(fill(plan, lengths, CAPACITY, patches, limit))
    assert np.mean(found, axis=0).min() >= 0.97


def lines_run(lengths: np.ndarray, world: int) -> int:
    """Lines of pack.py that a plan runs: its time but for the machine, as NumPy's calls are on few or small numbers."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == packing.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        pack(lengths, world, CAPACITY)
    finally:
        sys.settrace(before)
    return count


# Rows of a little more than a third of a bin need first-fit; the last ones try exchanges until they must stop.
@pytest.mark.parametrize("lengths", [(50, 4001), (2600, 3000), (529, 867), (2153, 5280)])
@pytest.mark.parametrize("world", [1, 8])
def test_the_time_a_row_takes_hardly_grows_with_their_number(lengths: tuple[int, int], world: int) -> None:
    random = np.random.default_rng(0)
    for rows in (1024, 4096):
        assert lines_run(random.integers(*lengths, rows), world) <= 140 * rows


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


def test_a_run_that_begins_anew_inside_a_step_finds_its_plan() -> None:
    first, anew = planner(50, 24, tokens=80), planner(50, 24, tokens=80)
    plans = [first.plan(step) for step in range(6)]
    assert len(plans[5].bins) > 2
    assert anew.plan(5) == plans[5]
    assert [first.plan(step) for step in range(6)] == plans


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


def test_the_planned_patches_are_those_of_the_rows() -> None:
    """Every bin of the plan holds the limit of patches when counted by dataset row."""
    ids, patches = np.arange(30) * 3 + 5, np.arange(30) % 7
    limited = Planner(np.full(30, 5), ids, 12, 2, 100, None, 42, patches, 9)
    free = Planner(np.full(30, 5), ids, 12, 2, 100, None, 42, patches)
    images = dict(zip(ids.tolist(), patches.tolist(), strict=True))
    for step in range(5):
        bins = [one for micro in limited.plan(step).bins for one in micro]
        assert max(sum(images[row] for row in one) for one in bins) <= 9
        assert free.plan(step).micro_steps == 1
        assert sorted(free.plan(step).rows) == sorted(limited.plan(step).rows)


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 300))
@example(100, 10, 11)
def test_total_steps_is_the_exact_quotient_rounded_up(rows: int, batch: int, tenths: int) -> None:
    steps = total_steps(rows, batch, tenths / 10)
    assert steps == ceil(Fraction(tenths, 10) * rows / batch)
    assert total_steps(rows, batch, tenths / 10, max_steps=7) == min(7, steps)


def test_a_run_has_at_least_one_step() -> None:
    assert total_steps(1, 100, 0.001) == 1
    # Of rl each rollout has several; --max_steps counts them all.
    assert [total_steps(100, 10, 1, most, each=4) for most in (None, 8)] == [40, 8]


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
    with pytest.raises(ValueError, match=f"needs {needed} passes, there are {needed - 1}"):
        schedule([9], runs, needed - 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_reached_rows_are_those_of_the_steps(steps: int) -> None:
    ids = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])
    planner = Planner(np.full(10, 5), ids, 3, 2, 100, None, 42)
    taken = {row for step in range(steps) for row in planner.plan(step).rows}
    assert planner.reached(steps) == sorted(taken)
