"""Several answers a record."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import pytest

from mirage_ds.config.flags import build_model
from mirage_ds.data.images import ImageFinder
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import load_decoder
from mirage_ds.evaluate.report import evaluate_file
from mirage_ds.evaluate.samples import best_of, sampled, sentence
from mirage_ds.evaluate.scoring import Prediction
from mirage_ds.evaluate.spec import EvaluateSpec

SAMPLE = Path(__file__).parents[3] / "data/sample_planning.jsonl"


@pytest.mark.parametrize("values", [[0, 0, 0], [1, 0, 0, 1, 0], [1, 1], [0.5, 0.2, 0.9, 0.2]])
def test_best_of_k_is_the_mean_over_all_choices_of_k(values: list[float]) -> None:
    for k in range(1, len(values) + 1):
        assert best_of(values, k) == pytest.approx(fmean(max(some) for some in combinations(values, k)))


def test_records_are_compared_by_what_is_boxed() -> None:
    said = [["a \\boxed{L}", "b \\boxed{R}", "\\boxed{R}"], ["x", "y", "x"]]
    answers = [[Prediction(text, [], []) for text in own] for own in said]
    marked = [[{"success": one, "runs": 0} for one in own] for own in ([True, False, False], [1.0, 0.0, 1.0])]
    found = sampled(answers, marked)
    assert found == {
        "count": 3, "metric": "success", "pass": {"1": 0.5, "2": pytest.approx((2 / 3 + 1) / 2), "3": 1.0},
        "majority": 0.5, "spread": stdev([1.0, 0.0, 0.5]), "distinct": 2.0,
    }  # fmt: skip
    assert sentence(found).startswith("success over 3 answers a record: best of 1 0.50, best of 2 0.83, best of 3 1.00")


def test_a_report_of_several_answers_holds_them_all(nano: Path) -> None:
    decoder = load_decoder(nano, ImageFinder.beside(SAMPLE, None))
    flags = dict(
        data_path=SAMPLE, task="vsp-spatial-planning", max_new_tokens=5, most=3, decoding="sampled", temperature=3.0
    )
    single, several = (evaluate_file(decoder, EvaluateSpec(**flags, samples=n)) for n in (1, 4))
    assert "samples" not in single
    assert (several["settings"]["samples"], several["samples"]["count"]) == (4, 4)
    for alone, own in zip(single["answers"], several["answers"], strict=True):
        # The first is the one that is drawn alone; the others have draws of their own.
        assert {name: own[name] for name in ("line", "prompt", "text", "ids")} == {
            name: alone[name] for name in ("line", "prompt", "text", "ids")
        }
        assert own["samples"][0]["ids"] == own["ids"]
        assert len({tuple(one["ids"]) for one in own["samples"]}) > 1
        for name, value in own["metrics"].items():
            assert value == pytest.approx(fmean(one["metrics"][name] for one in own["samples"]))
    assert several["all"]["count"] == 3
    with pytest.raises(UserError, match="--samples 2: greedy answers are all alike; add --decoding sampled or paper"):
        build_model(EvaluateSpec, dict(data_path=SAMPLE, samples=2))
