"""What could have been seen, against simulated studies; and the sentences that say it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mirage_ds.analysis.controls.paths import summary
from mirage_ds.analysis.controls.report import notes, words
from mirage_ds.analysis.controls.statistics import (
    POWER,
    differences,
    differs,
    mcnemar,
    sentence,
    unseen,
    visible_mean,
    visible_share,
)
from mirage_ds.evaluate.scoring import bootstrap

STUDIES = 4000
# Four standard errors of a share of so many studies.
ERROR = 4 * math.sqrt(POWER * (1 - POWER) / STUDIES)


@pytest.mark.parametrize(
    ("count", "discordant", "alpha"),
    [(12, 0.0, 0.05), (40, 0.0, 0.05), (40, 0.3, 0.05), (150, 0.1, 0.05), (150, 0.4, 0.05 / 8), (600, 0.05, 0.05 / 3)],
)
def test_simulated_studies_find_a_visible_difference_as_often_as_is_said(
    count: int, discordant: float, alpha: float
) -> None:
    """Records are drawn with the difference in truth, and judged by the test itself."""
    apart = visible_share(count, discordant, alpha)
    differ = max(discordant, apart)
    chances = [(differ + apart) / 2, (differ - apart) / 2, 1 - differ]
    drawn = np.random.default_rng(count).multinomial(count, chances, size=STUDIES)
    tested: dict[tuple[int, int], float] = {}
    for wins, losses, _ in map(tuple, drawn.tolist()):
        if (wins, losses) not in tested:
            tested[wins, losses] = mcnemar([1] * wins + [0] * losses, [0] * wins + [1] * losses)
    found = sum(tested[wins, losses] <= alpha for wins, losses, _ in drawn.tolist()) / STUDIES
    assert abs(found - POWER) < ERROR


def test_a_mean_of_numbers_is_found_as_often_as_is_said() -> None:
    count, spread, studies = 120, 3.0, 1000
    apart = visible_mean(spread / math.sqrt(count))
    drawn = np.random.default_rng(3).normal(apart, spread, size=(studies, count))
    bounds = [bootstrap(one, seed=1, resamples=600) for one in drawn]
    found = sum(differs({"low": low, "high": high, "p": None}) for low, high in bounds) / studies
    assert abs(found - POWER) < 4 * math.sqrt(POWER * (1 - POWER) / studies)


def test_fewer_records_see_less_and_five_nothing() -> None:
    assert [visible_share(count, 0.0, 0.05) for count in (4, 5)] == [None, None]
    seen = [visible_share(count, 0.1, 0.05) for count in (6, 12, 40, 400)]
    assert seen == sorted(seen, reverse=True)
    assert visible_share(40, 0.0, 0.05) < visible_share(40, 0.3, 0.05) < visible_share(40, 0.3, 0.01)
    # Six of 40 in one direction are the fewest that a p of 5 % is made of: 15 points are found about half of the time.
    assert 6 / 40 < visible_share(40, 0.0, 0.05) < 8 / 40


def compared(count: int, **hits: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Compare with a base that is right in the first half; name → records lost, and gained."""
    half = count // 2
    base = [1.0] * half + [0.0] * (count - half)
    found = {
        name: [0.0] * lost + [1.0] * (half - lost) + [1.0] * won + [0.0] * (count - half - won)
        for name, (lost, won) in hits.items()
    }
    return differences(found, base, seed=1)


def test_a_sentence_says_what_was_found_and_what_was_not() -> None:
    found = compared(40, zero=(12, 0), swap=(0, 0), top=(0, 15), off=(3, 2))
    said = sentence(found, "own", 40, "success")
    zero, top = found["zero"], found["top"]
    assert said.startswith(
        f"On 40 records: success is lower with zero (-30.0 points, 95 % interval {100 * zero['low']:+.1f} to "
        f"{100 * zero['high']:+.1f}, p = {zero['p_holm']:.4f}) than with own; success is higher with top (+37.5 points"
    )
    assert (
        f"p = {top['p_holm']:.4f}) than with own; no difference of success is found between own and swap or off" in said
    )
    low, high = (100 * visible_share(40, share, 0.05 / 4) for share in (0, 5 / 40))
    assert low == high == pytest.approx(24.5, abs=0.1)
    assert said.endswith(f"off, where one below {low:.1f} points would be missed more than 1 time in 5.")
    assert sentence(compared(4, zero=(2, 0)), "own", 4, "success") == (
        "On 4 records: no difference of success is found between own and zero, where with so few records none of any "
        "size could show."
    )


def test_numbers_are_no_points() -> None:
    found = differences({"b": [3.0, 4.5, 2.0, 6.0], "c": [2.0, 2.0, 3.0, 1.0]}, [1.0, 2.0, 2.0, 3.0], seed=1)
    said = sentence(found, "a", 4, "moves")
    assert said.startswith(f"On 4 records: moves is higher with b (+1.88, 95 % interval {found['b']['low']:+.3g} to")
    assert said.endswith(f"c, where one below {found['c']['visible']:.3g} would be missed more than 1 time in 5.")
    assert unseen([0.0], False) == "no record differs at all"
    assert unseen([0.03, None, 0.0601], True).startswith("one below 3.0 to 6.0 points, by comparison, would")


def test_controls_say_where_the_likelihood_alone_moves_and_where_nothing_could() -> None:
    def said(opened: int, by: float) -> str:
        logs = differences({"zero": [by, by / 2, by / 3]}, [0.0, 0.0, 0.0], 1)["zero"]
        one = {"score": {"metric": "correct"}, "score_difference": score, "log_likelihood_difference": logs}
        return words({"zero": one}, one | {"opened": opened}, 40)

    score = compared(40, zero=(0, 0))["zero"]
    still = said(40, 0.0)
    assert still.endswith("would be missed more than 1 time in 5.")
    assert said(40, -1.0) == f"{still[:-1]}; log p does differ with zero."
    assert said(37, 0.0) == f"{still[:-1]}; in 3 the model opened no latent block, and there nothing can change."
    assert said(0, -1.0) == "Nothing could show: the model opened no latent block in any of 40 records."


@pytest.mark.parametrize(
    ("follows", "end"),
    [
        (["ii", "ii", "ii", "ni"], "alternative are left out."),
        (["io", "io"], "So no difference is found, where no record differs at all."),
        (["io", "on", "in"] * 20, "found, where one below 14.8 points would be missed more than 1 time in 5."),
    ],
)
def test_a_note_on_paths_says_what_could_not_be_seen(follows: list[str], end: str) -> None:
    kinds = {"i": "injected", "o": "other", "n": "neither"}
    found = summary([{"A": kinds[a], "B": kinds[b]} for a, b in follows], seed=1)
    (said,) = notes({"path": found | {"opened": 4, "left_out": 0}})
    assert said.endswith(end)
