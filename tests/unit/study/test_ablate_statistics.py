"""The statistics of a study's report against loops, enumeration and simulated studies."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.studies import Scored, columns

from mirage_ds.analysis.controls.statistics import mcnemar
from mirage_ds.study.report.statistics import (
    FLIPS,
    TOO_FEW,
    Column,
    Draws,
    Grid,
    Misfit,
    column,
    compare,
    equivalent,
    estimate,
    level_key,
    line_up,
    make_column,
    sign_flip,
    verdict,
)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the order statistics, as numpy's default."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def study(seeds: int, records: int, between: float, rng: np.random.Generator, shift: float = 0.0) -> np.ndarray:
    """Normal scores with an effect of the seed, one of the record, and noise of 1."""
    effects = between * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, records))
    return shift + effects + rng.normal(size=(seeds, records))


# ---------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("seeds", "sizes"), [(3, (2, 4)), (1, (5,)), (4, (1, 1, 3))])
def test_bounds_are_those_of_a_loop_over_the_same_draws(seeds: int, sizes: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).normal(size=(seeds, sum(sizes)))
    # More than the code multiplies at a time.
    draws = Draws(1203, seed=5)
    overall, levels = estimate(values, sizes, draws)
    shares, counts = draws.seeds(seeds), draws.records(sizes)
    ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    parts = [(0, sum(sizes))] + [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    for found, (start, stop) in zip([overall, *levels], parts, strict=True):
        means = []
        for r in range(1203):
            picked = [s for s in range(seeds) for _ in range(round(shares[r, s] * seeds))]
            rows = [n for n in range(start, stop) for _ in range(counts[r, n])]
            cells = [values[s, n] for s in picked for n in rows]
            assert len(cells) == seeds * (stop - start)
            means.append(sum(cells) / len(cells))
        assert found["mean"] == pytest.approx(values[:, start:stop].mean(), abs=1e-11)
        bounds = [quantile(means, share) for share in (0.025, 0.975, 0.05, 0.95)]
        assert [found["low"], found["high"], found["low90"], found["high90"]] == pytest.approx(bounds, abs=1e-11)
        assert (found["seeds"], found["records"]) == (seeds, stop - start)


def test_bounds_are_quantiles_of_all_ways_to_draw_seeds_and_records() -> None:
    values = np.random.default_rng(4).normal(size=(3, 5))
    overall, (first, _) = estimate(values, (3, 2), Draws())
    whole, part = [], []
    for seeds in itertools.product(range(3), repeat=3):
        # One draw of records for all seeds, within each level.
        for one in itertools.product(range(3), repeat=3):
            by_seed = [values[s, n] for s in seeds for n in one]
            part.append(sum(by_seed) / 9)
            for other in itertools.product((3, 4), repeat=2):
                whole.append((sum(by_seed) + sum(values[s, n] for s in seeds for n in other)) / 15)
    for found, every in ((overall, whole), (first, part)):
        for bound, share in (
            (found["low"], 0.025),
            (found["low90"], 0.05),
            (found["high90"], 0.95),
            (found["high"], 0.975),
        ):
            below = sum(one < bound - 1e-9 for one in every) / len(every)
            upto = sum(one <= bound + 1e-9 for one in every) / len(every)
            # Four standard errors of the share in 10,000 draws, and one of the two order statistics between which the
            # bound lies.
            error = 4 * math.sqrt(share * (1 - share) / 10_000) + 1 / len(every)
            assert below - error <= share <= upto + error


def test_draws_keep_the_mix_of_levels_and_do_not_depend_on_what_was_asked_before() -> None:
    draws = Draws(600, seed=3)
    first = draws.records((7, 300)).copy()
    assert (first[:, :7].sum(1) == 7).all()
    assert (first[:, 7:].sum(1) == 300).all()
    assert first.mean(0) == pytest.approx(np.ones(307), abs=0.25)
    assert draws.seeds(5).sum(1) == pytest.approx(np.ones(600))
    other = Draws(600, seed=3)
    for sizes in ((1,), (2, 2), (300, 7), (9,), (4,)):
        other.records(sizes)
    assert (other.records((7, 300)) == first).all()
    assert (Draws(600, seed=4).records((7, 300)) != first).any()


def test_one_seed_resamples_records_alone_and_says_so() -> None:
    values = np.random.default_rng(2).integers(2, size=(1, 400)).astype(float)
    found, _ = estimate(values, (400,), Draws())
    error = values.std() / math.sqrt(400)
    assert found["resampled"] == "records"
    assert (found["low"], found["high"]) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error
    )
    assert estimate(np.repeat(values, 2, axis=0), (400,), Draws())[0]["resampled"] == "seeds and records"


def test_interval_is_wider_than_over_records_or_seeds_alone() -> None:
    values = study(8, 50, 0.3, np.random.default_rng(8))
    both, _ = estimate(values, (50,), Draws())
    records, _ = estimate(values.mean(0, keepdims=True), (50,), Draws())
    seeds, _ = estimate(values.mean(1, keepdims=True).T, (8,), Draws())
    width = both["high"] - both["low"]
    assert width > 1.05 * (records["high"] - records["low"])
    assert width > 1.05 * (seeds["high"] - seeds["low"])
    # Both sources add up as variances.
    assert width**2 == pytest.approx(
        (records["high"] - records["low"]) ** 2 + (seeds["high"] - seeds["low"]) ** 2, rel=0.15
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, draws, held, alone, wrong = np.random.default_rng(11), Draws(400), 0, 0, 0
    for _ in range(300):
        values = study(10, 60, 0.5, rng)
        both, _ = estimate(values, (20, 40), draws)
        records, _ = estimate(values.mean(0, keepdims=True), (20, 40), draws)
        held += both["low"] <= 0 <= both["high"]
        alone += records["low"] <= 0 <= records["high"]
        # The truth lies on the margin: equivalence would be a mistake.
        wrong += equivalent(estimate(values + 0.6, (20, 40), draws)[0], 0.6)
    # Percentiles over ten seeds are a little too narrow: about 0.92.
    assert 0.88 <= held / 300 <= 0.98
    assert alone / 300 < 0.85
    assert wrong / 300 <= 0.12


def test_a_large_study_takes_seconds() -> None:
    values = np.random.default_rng(0).integers(2, size=(8, 4000)).astype(float)
    start = time.process_time()
    estimate(values, (2000, 2000), Draws())
    assert time.process_time() - start < 8


def test_equal_scores_have_an_interval_without_width() -> None:
    found, (level,) = estimate(np.full((4, 30), 0.1), (30,), Draws(500))
    assert (
        (found["low"], found["mean"], found["high"]) == (level["low"], level["mean"], level["high"]) == (0.1, 0.1, 0.1)
    )


# -------------------------------------------------------------------------------------------------------------- tests


def by_signs(differences: Sequence[float]) -> float:
    """The share of all sign patterns whose sum is as far from 0, or farther."""
    patterns = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(one >= abs(sum(differences)) - 1e-9 for one in sums) / len(sums)


@pytest.mark.parametrize("count", [5, 6, 8, 11])
def test_sign_flip_tries_every_pattern(count: int) -> None:
    rng = random.Random(count)
    for shift in (0.0, 0.5, 3.0):
        differences = [rng.gauss(shift, 1) for _ in range(count)]
        assert sign_flip(differences) == by_signs(differences)
    # Ties, whose sums differ in the last bit by the order of adding.
    assert sign_flip([0.1, 0.2, 0.3, -0.1, 0.7][:count]) == by_signs([0.1, 0.2, 0.3, -0.1, 0.7][:count])
    assert sign_flip([0.1] * count) == sign_flip([-0.3] * count) == 2 ** (1 - count)
    assert sign_flip([0.0] * count) == 1


def test_sign_flip_of_many_seeds_draws_patterns() -> None:
    rng = random.Random(1)
    differences = [rng.gauss(0.3, 1) for _ in range(17)]
    sums = np.zeros(1)
    for one in differences:
        sums = np.add.outer(sums, [one, -one]).ravel()
    exact = float((np.abs(sums) >= abs(sum(differences)) - 1e-9).mean())
    assert sign_flip(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact / FLIPS))
    assert sign_flip(differences) == sign_flip(differences) != sign_flip(differences, seed=1)
    # Never 0: the observed pattern is one of them.
    assert sign_flip([1.0] * 40) == 1 / (FLIPS + 1)


def binary(seeds: int, records: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seeds)
    base = (rng.random((seeds, records)) < 0.4).astype(float)
    return np.maximum(base, rng.random((seeds, records)) < 0.3), base


def compared(arm: np.ndarray, base: np.ndarray, draws: int = 1000) -> dict[str, Any]:
    grid = Grid(tuple(range(len(arm))), {"?": arm.shape[1]}, np.stack([arm, base]), left_out=0)
    return compare(grid, 0.02, Draws(draws))


def test_the_number_of_seeds_chooses_the_test() -> None:
    arm, base = binary(1)
    one = compared(arm, base)
    assert (one["test"], one["p"], one["least_p"]) == ("McNemar", mcnemar(arm[0].tolist(), base[0].tolist()), None)
    assert one["difference"]["resampled"] == "records"
    one = compared(arm / 2, base)
    assert (one["test"], one["p"]) == ("none", None)
    for seeds in (2, 3, 4):
        one = compared(*binary(seeds))
        assert (one["test"], one["p"], one["least_p"]) == ("none", None, None)
    for seeds in (5, 8):
        arm, base = binary(seeds)
        one = compared(arm, base)
        apart = [seed["difference"] for seed in one["by_seed"]]
        assert apart == pytest.approx([(a - b).mean() for a, b in zip(arm, base, strict=True)])
        assert (one["test"], one["p"]) == ("sign-flip", by_signs(apart))
        assert one["least_p"] == 2 / 2**seeds
        assert one["p"] >= one["least_p"]
    assert compared(*binary(17))["test"] == "sign-flip, random"


def test_a_comparison_is_paired() -> None:
    rng = np.random.default_rng(6)
    base = study(6, 80, 5.0, rng)
    arm = base + 0.1 + 0.01 * rng.normal(size=base.shape)
    one = compared(arm, base)
    assert one["difference"]["mean"] == pytest.approx((arm - base).mean())
    # Each by itself is known to within several units.
    assert one["difference"]["high"] - one["difference"]["low"] < 0.01
    assert one["verdict"] == "higher"
    back = compared(base, arm)
    assert (back["verdict"], back["difference"]["mean"], back["p"]) == ("lower", -one["difference"]["mean"], one["p"])


# Margin 0.02.
@pytest.mark.parametrize(
    ("bounds", "word", "same"),
    [
        ((0.01, 0.05, 0.012, 0.04), "higher", False),
        ((-0.05, -0.01, -0.04, -0.012), "lower", False),
        ((0.001, 0.012, 0.002, 0.011), "higher", True),
        ((-0.012, -0.001, -0.011, -0.002), "lower", True),
        ((-0.012, 0.015, -0.01, 0.013), "equivalent", True),
        # The 95 % interval may reach beyond the margin; the 90 % one may not, and may not touch it.
        ((-0.03, 0.025, -0.019, 0.019), "equivalent", True),
        ((-0.03, 0.019, -0.021, 0.01), "undecided", False),
        ((-0.01, 0.03, -0.005, 0.02), "undecided", False),
        ((0.0, 0.05, 0.01, 0.04), "undecided", False),
    ],
)
def test_verdicts(bounds: tuple[float, float, float, float], word: str, same: bool) -> None:
    low, high, low90, high90 = bounds
    one = {"low": low, "high": high, "low90": low90, "high90": high90}
    assert (verdict(one, 0.02), equivalent(one, 0.02)) == (word, same)
    assert verdict(one, 0.02, 0.05) == word
    # A test that finds nothing takes higher and lower back.
    without = "equivalent" if same else "undecided"
    assert verdict(one, 0.02, 0.051) == (without if word in ("higher", "lower") else word)


def test_identical_arms_are_equivalent_and_not_significant() -> None:
    arm, _ = binary(8)
    one = compared(arm, arm)
    assert (one["verdict"], one["p"], one["difference"]["low"], one["difference"]["high"]) == ("equivalent", 1, 0, 0)


# --------------------------------------------------------------------------------------------------------------- grid


def test_column_leaves_out_what_has_no_finite_value() -> None:
    scores = [
        Scored("a", "5", {"success": 1.0}),
        Scored("b", "6", {"success": math.nan}),
        Scored("c", "6", {"other": 1.0}),
        Scored("d", "6", {"success": True}),
    ]
    found = column(columns(scores), "success")
    assert found.to_dict("index") == {"a": {"level": "5", "value": 1.0}, "d": {"level": "6", "value": 1.0}}
    assert list(column(columns(scores), "success", only=("6",)).index) == ["d"]
    assert len(column(columns(scores), "nonsense")) == len(column(columns([]), "success")) == 0


def test_levels_are_sorted_as_numbers() -> None:
    assert sorted(["10", "nan", "9", "?", "hard", "1.5"], key=level_key) == ["1.5", "9", "10", "?", "hard", "nan"]


def make(values: dict[str, float], level: str = "?") -> Column:
    levels = [level if level != "?" else name[0] for name in values]
    return make_column(list(values), levels, list(values.values()))


def test_line_up_pairs_by_seed_and_record_whatever_the_order() -> None:
    one = {3: make({"5a": 1, "6a": 2, "5b": 3}), 1: make({"6a": 5, "5b": 6, "5a": 4}), 9: make({"5a": 0})}
    other = {1: make({"5b": 60, "5a": 40, "6a": 50, "6z": 0}), 3: make({"5a": 10, "5b": 30, "6a": 20}), 4: make({})}
    grid = line_up([one, other])
    assert grid.seeds == (1, 3)
    assert (list(grid.levels.items()), grid.left_out) == ([("5", 2), ("6", 1)], 1)
    assert grid.values.tolist() == [[[4, 6, 5], [1, 3, 2]], [[40, 60, 50], [10, 30, 20]]]
    with pytest.raises(Misfit, match="no common seed"):
        line_up([{1: one[1]}, {2: one[3]}])
    with pytest.raises(Misfit, match="no common record"):
        line_up([{1: one[1]}, {1: make({"x": 1})}])


@pytest.mark.parametrize(
    ("seeds", "word"), [(1, TOO_FEW), (2, TOO_FEW), (4, TOO_FEW), (5, "equivalent"), (6, "equivalent")]
)
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_below_five_seeds_nothing_is_said(seeds: int, word: str, shift: float) -> None:
    base = np.zeros((seeds, 40))
    one = compared(base + shift, base, 200)
    # The exact test over five seeds gives 0.0625 at best.
    assert one["verdict"] == (word if word == TOO_FEW or not shift else "undecided" if seeds == 5 else "higher")
    assert one["equivalent"] == (word == "equivalent" and not shift)
