"""A scorer of one's own that fails while a run evaluates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mirage_ds.errors import Stopped, UserError
from mirage_ds.run import validation
from mirage_ds.run.validation import Evaluator


def test_a_scorer_that_fails_costs_the_scores_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> dict[str, float]:
        raise UserError("record on line 7: task scores:near fails for the answer 'x' (ValueError: x)")

    said: list[str] = []
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.run = cast(Any, SimpleNamespace(journal=SimpleNamespace(say=said.append)))
    evaluator.names, evaluator.chosen, evaluator.limits = ["score", "count"], [0], cast(Any, None)
    evaluator.learner = evaluator.rows = cast(Any, None)
    monkeypatch.setattr(validation, "decode_rows", lambda *_: ["an answer"])
    monkeypatch.setattr(evaluator, "_scored", fails)
    scores = evaluator._scores(30)
    assert list(scores) == ["score", "count"]
    assert all(math.isnan(one) for one in scores.values())
    (line,) = said
    assert line.startswith(
        "error: evaluation after step 30: record on line 7: task scores:near fails for the answer 'x'"
    )
    assert line.endswith("; nothing is scored")
    # What one rank alone has met ends the run, and ranks that leave on request leave.
    for error in (UserError("record on line 7", everywhere=False), Stopped()):

        def leaves(*_: Any, error: BaseException = error) -> list[Any]:
            raise error

        monkeypatch.setattr(validation, "decode_rows", leaves)
        with pytest.raises(type(error)):
            evaluator._scores(30)
