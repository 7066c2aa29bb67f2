"""The statistics of the controls against enumeration, dense matrices and numbers from textbooks."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from mirage_ds.analysis.controls.conditions import Gaussian
from mirage_ds.analysis.controls.paths import summary
from mirage_ds.analysis.controls.report import compare
from mirage_ds.analysis.controls.statistics import difference, differences, holm, mcnemar
from mirage_ds.cli import main
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import average, bootstrap, wilson

# ---------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0, 3.0, -2.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.5, 0.25, -0.125, 7.0]])
def test_bootstrap_bounds_are_the_quantiles_of_all_resamples(values: list[float]) -> None:
    every = sorted(sum(one) / len(values) for one in itertools.product(values, repeat=len(values)))
    low, high = bootstrap(values, seed=1)
    # 10,000 draws: a share of 2.5 % is met within four of its standard errors, 0.6 %.
    for bound, share in ((low, 0.025), (high, 0.975)):
        below = sum(one < bound - 1e-9 for one in every) / len(every)
        upto = sum(one <= bound + 1e-9 for one in every) / len(every)
        assert below - 0.0063 <= share <= upto + 0.0063


def test_bootstrap_of_many_values_is_near_the_normal_interval_and_repeatable() -> None:
    values = np.random.default_rng(5).normal(3, 2, size=1500).tolist()
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    low, high = bootstrap(values, seed=7)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.12 * error)
    assert bootstrap(values, seed=7) == (low, high) != bootstrap(values, seed=8)
    assert bootstrap([0.25] * 9, seed=7) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no value"):
        bootstrap([], seed=1)


def test_bootstrap_of_very_many_values_is_the_normal_interval() -> None:
    """Resampling 100,000 records would take a minute."""
    values = np.random.default_rng(5).random(100_000)
    mean, error = values.mean(), values.std() / math.sqrt(len(values))
    assert bootstrap(values, seed=7) == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error), rel=1e-9)


def test_average_has_wilsons_interval_where_values_are_binary() -> None:
    one = average([1, 0, 1, True, 0.0], seed=1)
    assert tuple(one.values()) == (0.6, *wilson(3, 5))
    other = average([1, 0, 0.5], seed=1)
    assert (other["low"], other["high"]) == bootstrap([1, 0, 0.5], 1)


# -------------------------------------------------------------------------------------------------------------- tests


def by_signs(wins: int, losses: int) -> Fraction:
    """p by trying all 2ⁿ ways in which chance hands out n wins: the share that is as far from n / 2, or farther."""
    n = wins + losses
    far = [abs(2 * sum(one) - n) >= abs(wins - losses) for one in itertools.product((0, 1), repeat=n)]
    return Fraction(sum(far), len(far))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 5), (3, 3), (7, 2), (2, 9), (10, 1)])
def test_mcnemar_is_the_share_of_sign_patterns(wins: int, losses: int) -> None:
    pairs = [(1, 0)] * wins + [(0, 1)] * losses + [(1, 1)] * 4 + [(0, 0)] * 3
    random.Random(wins).shuffle(pairs)
    one, other = zip(*pairs, strict=True)
    assert mcnemar(one, other) == pytest.approx(float(by_signs(wins, losses)), rel=1e-12)
    assert mcnemar(one, other) == mcnemar(other, one)


def test_mcnemar_of_many_records_does_not_overflow() -> None:
    one, other = [1] * 2100 + [0] * 1900, [0] * 2100 + [1] * 1900
    z = (200 - 1) / math.sqrt(4000)
    assert mcnemar(one, other) == pytest.approx(2 * (1 - NormalDist().cdf(z)), rel=0.01)


def test_holm_by_hand() -> None:
    # 0.01 · 4, 0.02 · 3, then 0.03 · 2 and 0.04 · 1, which may not fall below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([]) == []


def test_differences_are_paired_and_adjusted_together() -> None:
    base = [1, 1, 0, 0, 1, 0, 1, 1, 0, 1]
    worse = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    found = differences({"same": base, "worse": worse, "real": [0.5] * 10}, base, seed=3)
    same = {key: one for key, one in found["same"].items() if key != "visible"}
    assert same == {"mean": 0, "low": 0, "high": 0, "p": 1, "p_holm": 1}
    assert found["worse"]["mean"] == pytest.approx(-0.5)
    assert found["worse"]["p"] == float(by_signs(0, 5)) == 0.0625
    # Two of the three can be tested, so the smaller p is doubled.
    assert found["worse"]["p_holm"] == 0.125
    assert (found["real"]["p"], found["real"]["p_holm"]) == (None, None)
    # Paired: the interval is that of the differences, not of two means apart.
    assert difference([x + 5 for x in base], base, seed=3)["low"] == 5


# ------------------------------------------------------------------------------------------------------------ gaussian


def dense(vectors: torch.Tensor) -> torch.Tensor:
    """The shrunk covariance as the paper defines it, with every H × H matrix written out."""
    n, width = vectors.shape
    x = vectors.double() - vectors.double().mean(0)
    sample = sum(torch.outer(one, one) for one in x) / n
    m = torch.trace(sample) / width
    identity = torch.eye(width, dtype=torch.float64)
    d2 = ((sample - m * identity) ** 2).sum() / width
    b2 = sum(((torch.outer(one, one) - sample) ** 2).sum() / width for one in x) / n**2
    b2 = min(b2, d2)
    return b2 / d2 * m * identity + (d2 - b2) / d2 * sample


@pytest.mark.parametrize(("n", "width"), [(3, 5), (6, 30), (40, 4), (200, 3)])
def test_gaussian_has_the_papers_covariance(n: int, width: int) -> None:
    generator = torch.Generator().manual_seed(n)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    vectors = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + 3
    found = Gaussian(vectors)
    own = found.deviations.T @ found.deviations / n
    made = (1 - found.share) * own + found.share * found.variance * torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(made, dense(vectors), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.mean, vectors.mean(0))
    assert 0 < found.share <= 1


def test_gaussian_draws_have_mean_and_covariance() -> None:
    vectors = torch.randn(9, 6, generator=torch.Generator().manual_seed(2)).double() * torch.arange(1, 7) + 2
    one, count = Gaussian(vectors), 60_000
    drawn = one.draw(count, torch.Generator().manual_seed(4))
    wanted = dense(vectors)
    # Five standard errors of a mean and of a covariance under normality.
    variances = wanted.diagonal()
    assert ((drawn.mean(0) - vectors.mean(0)).abs() <= 5 * (variances / count).sqrt()).all()
    error = ((torch.outer(variances, variances) + wanted**2) / count).sqrt()
    assert ((torch.cov(drawn.T) - wanted).abs() <= 5 * error).all()
    # They are not the vectors themselves.
    assert torch.cdist(drawn[:100], vectors).min() > 1e-3


def test_gaussian_of_equal_vectors_is_that_vector() -> None:
    vector = torch.arange(5.0)
    drawn = Gaussian(vector.expand(4, 5)).draw(3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, vector.double().expand(3, 5))


# --------------------------------------------------------------------------------------------------------------- paths


def test_paths_are_counted_by_injection() -> None:
    kinds = {"i": "injected", "o": "other", "n": "neither"}
    # Twice an answer that goes with the latents, one that says A whatever is fed, one that is neither.
    follows = [{"A": kinds[a], "B": kinds[b]} for a, b in ("ii", "ii", "io", "nn", "in")]
    found = summary(follows, seed=1)
    assert found["records"] == 5
    assert {name: [found[name][kind]["count"] for kind in kinds.values()] for name in "AB"} == {
        "A": [4, 0, 1],
        "B": [2, 1, 2],
    }
    assert found["A"]["injected"]["share"] == 0.8
    assert (found["B"]["other"]["low"], found["B"]["other"]["high"]) == wilson(1, 5)
    # (6 − 1) of the ten answers; per record 1, 1, 0, 0, ½.
    assert found["difference"] == 0.5
    assert (found["low"], found["high"]) == bootstrap([1, 1, 0, 0, 0.5], 1)
    stubborn = summary([{"A": "injected", "B": "other"}, {"A": "other", "B": "injected"}], seed=1)
    assert (stubborn["difference"], stubborn["low"], stubborn["high"]) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------------------- compare


def result(path: Path, success: list[bool], **changes: Any) -> Path:
    """Write a file as `mirage-ds evaluate --out` does."""
    answers = [
        {
            "line": at + 1,
            "row": at,
            "prompt": f"hash{at}",
            "text": "",
            "runs": [4],
            "metrics": {"success": one, "moves": 3 * one},
        }
        for at, one in enumerate(success)
    ]
    report = {"task": "vsp-spatial-planning", "data": "test.jsonl", "hashes": {"data": "abc"}, "answers": answers}
    report |= {"settings": {}, "levels": {}, "all": {}}
    path.write_text(json.dumps(report | changes))
    return path


A, B, C = [True] * 6 + [False] * 4, [False] * 5 + [True] * 5, [True] * 7 + [False] * 3


def test_compare_pairs_every_file_with_the_first(tmp_path: Path) -> None:
    files = [result(tmp_path / f"{name}.json", values) for name, values in (("a", A), ("b", B), ("c", C))]
    report = compare(files, None, seed=5)
    assert (report["task"], report["metric"], report["records"]) == ("vsp-spatial-planning", "success", 10)
    one, two, three = (report["files"][str(file)] for file in files)
    assert one["difference"] is None
    assert [part["mean"] for part in (one, two, three)] == [0.6, 0.5, 0.7]
    assert two["difference"]["p"] == float(by_signs(4, 5))
    assert three["difference"]["p"] == float(by_signs(1, 0)) == 1
    assert two["difference"]["mean"] == pytest.approx(-0.1)
    apart = [float(b) - float(a) for a, b in zip(A, B, strict=True)]
    assert (two["difference"]["low"], two["difference"]["high"]) == bootstrap(apart, 5)
    moves = compare(files, "moves", seed=5)["files"][str(files[1])]
    assert moves["mean"] == 1.5
    assert moves["difference"]["p"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "vsp-spatial-reasoning"}, "of different tasks (vsp-spatial-planning, vsp-spatial-reasoning)"),
        ({"hashes": {"data": "xyz"}}, "of different data (abc, xyz)"),
        ({"columns": "answer=b"}, "of different --columns (None, answer=b)"),
        ({"answers": "less"}, "of different numbers of answers (10, 9)"),
        ({"answers": "other line"}, "of different rows (line 4, line 40)"),
        ({"answers": "other question"}, "the question on line 4 is not the same"),
    ],
)
def test_compare_refuses_strangers(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    one, other = result(tmp_path / "a.json", A), result(tmp_path / "b.json", B)
    answers = json.loads(other.read_text())["answers"]
    kinds: dict[str, Callable] = {
        "less": lambda: answers[:-1],
        "other line": lambda: [row | ({"line": 40} if row["line"] == 4 else {}) for row in answers],
        "other question": lambda: [row | ({"prompt": "!"} if row["line"] == 4 else {}) for row in answers],
    }
    if "answers" in changes:
        changes = {"answers": kinds[changes["answers"]]()}
    result(other, B, **changes)
    with pytest.raises(UserError) as refusal:
        compare([one, other], None, seed=1)
    assert said in str(refusal.value)
    assert str(one) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_compare_refuses_what_is_no_pair_of_results(tmp_path: Path) -> None:
    one, other = result(tmp_path / "a.json", A), result(tmp_path / "b.json", B)
    for text in ("no json", "[]", "{}", '{"answers": [{"line": 1}], "task": "t", "data": "d"}', '{"answers": 3}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=r"c.json: is no file of scores; `mirage-ds evaluate"):
            compare([one, tmp_path / "c.json"], None, seed=1)
    whole = json.loads(one.read_text())
    first = whole["answers"][0]
    for broken in (
        {"hashes": None},
        {"hashes": {}},
        {"answers": 3},
        {"answers": [{key: value for key, value in first.items() if key != "prompt"}]},
        {"answers": [first | {"metrics": None}]},
        {"answers": [first | {"metrics": {"success": None}}]},
    ):
        (tmp_path / "c.json").write_text(json.dumps(whole | broken))
        with pytest.raises(UserError, match=r"c.json: is no file of scores"):
            compare([one, tmp_path / "c.json"], None, seed=1)
    with pytest.raises(UserError, match="cannot be read"):
        compare([one, tmp_path / "gone.json"], None, seed=1)
    for files in ([one], [one, other, one]):
        with pytest.raises(UserError, match="at least two result files, each once"):
            compare(files, None, seed=1)
    with pytest.raises(UserError, match=r"--metric sucess: not in every answer \(did you mean 'success'\?\)"):
        compare([one, other], "sucess", seed=1)


def test_compare_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = result(tmp_path / "a.json", A), result(tmp_path / "b.json", B)
    out, page = tmp_path / "deep" / "out.json", tmp_path / "out.md"
    monkeypatch.setenv("COLUMNS", "200")
    words = ["mirage-ds", "compare", str(one), str(other), "--out", str(out), "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    main()
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report == compare([one, other], None, seed=42)
    apart = report["files"][str(other)]["difference"]
    row = f"-0.100 ({apart['low']:+.3f}, {apart['high']:+.3f})"
    assert row in said
    # Nine of the ten differ, and yet the two are as good as each other.
    sentence = f"On 10 records: no difference of success is found between {one} and {other}, where one below"
    assert re.search(
        rf"{re.escape(sentence)} \d\d\.\d points would be missed more than 1 time in 5\.\n$", page.read_text()
    )
    assert " ".join(said.split()).endswith("would be missed more than 1 time in 5.")
    assert f"| {other} | 0.500 (0.237, 0.763) | {row} | 1.0000 | 1.0000 |" in page.read_text()
