"""Evaluation while a run trains: a scorer of one's own that fails, and whether answers may open latent blocks."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(
    ("stage", "slots", "policy", "latents"),
    [
        ("rl", None, "text", False),
        ("rl", None, "through", True),
        ("sft", None, None, False),
        ("stage2", None, None, True),
    ],
)
def test_answers_open_latent_blocks_where_training_does(
    stage: str, slots: str | None, policy: str | None, latents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def decode(*those: Any, **_: Any) -> list[str]:
        given.append(those[5])
        return ["an answer"]

    monkeypatch.setattr(validation, "whole_model", nullcontext)
    monkeypatch.setattr(validation, "everyone", lambda own, _: own)
    for name in ("tower_of", "prompt_of"):
        monkeypatch.setattr(validation, name, lambda *_: None)
    monkeypatch.setattr(validation, "decode_samples", decode)
    run = SimpleNamespace(
        world=SimpleNamespace(rank=0, size=1), config=SimpleNamespace(stage=stage, slots=slots),
        journal=SimpleNamespace(at=lambda _: None), asked=None, stops=lambda: False,
    )  # fmt: skip
    learner = SimpleNamespace(engine=None, state={"latent_policy": policy} if policy else {})
    rows = type("Rows", (), {"encoder": SimpleNamespace(slots=slots), "__getitem__": lambda _, row: row})()
    made = validation.decode_rows(cast(Any, run), cast(Any, learner), rows, [3], cast(Any, None))
    assert (made, given) == (["an answer"], [latents])


def test_the_first_rows_with_a_block_are_measured_and_none_of_sft() -> None:
    runs = np.tile([0, 1, 2], 1000)
    planner, rows = SimpleNamespace(row_ids=np.arange(1, 3000)), SimpleNamespace(records={"runs": runs})
    evaluation: Any = SimpleNamespace(loader=SimpleNamespace(planner=planner, rows=rows))

    def chosen(stage: str, k: int, compress: str = "average") -> set[int]:
        run: Any = SimpleNamespace(config=SimpleNamespace(stage=stage, latent_size=k, compress_strategy=compress))
        return validation.rows_to_measure(run, evaluation)

    assert chosen("stage2", 4) == {row for row in range(1, 385) if row % 3}
    assert len(chosen("stage1", 2)) == 512
    assert chosen("sft", 4) == chosen("stage1", 4, "region") == set()


def test_of_a_row_its_first_block_is_measured() -> None:
    """Rows 7 (two blocks), 3 (none), the dummy, and 5, which is not asked for."""
    batch: Any = SimpleNamespace(rows=torch.tensor([7, 3, -1, 5]), latent_count=torch.tensor([4, 0, 2, 2]))
    latents = torch.arange(16, dtype=torch.bfloat16).view(8, 2)
    ((row, own),) = validation.first_blocks(batch, cast(Any, SimpleNamespace(latents=latents)), {3, 7}, 2)
    assert (row, own.tolist(), own.dtype) == (7, [[0, 1], [2, 3]], torch.float32)
