"""An optimizer step on a rollout's answers: what it reports beside the loss.

N samples of a micro-batch.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mirage_ds.errors import UserError
from mirage_ds.rl import step
from mirage_ds.rl.objective import SUMS, Totals
from mirage_ds.rl.rollout import Sampled
from mirage_ds.rl.step import Micro, Pupil

LOSSES, ROWS = [1.0, math.nan, 2.0], [[7, 9], [8], [6, -1]]


@pytest.fixture
def pupil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A step of three micro-batches whose losses are LOSSES; the gradient is not finite."""
    answers = [Sampled(row, [1], [-1.0], (), None, False) for row in (7, 9, 8, 6)]
    engine = SimpleNamespace(set_gradient_accumulation_boundary=lambda _: None, get_lr=lambda: [1e-3])
    world = SimpleNamespace(device=torch.device("cpu"))
    pupil: Any = object.__new__(Pupil)
    pupil.run = SimpleNamespace(
        config=SimpleNamespace(max_grad_norm=1.0, log_rows=True, max_drift=0.1, steps_per_rollout=1),
        world=world,
        journal=SimpleNamespace(at=lambda *_: None),
    )
    pupil.learner = SimpleNamespace(engine=engine, flops=SimpleNamespace(of_text=lambda *_: 0))
    pupil.lesson = SimpleNamespace(answers=answers)
    pupil.rows = SimpleNamespace(records={"tokens": torch.ones(10)})
    pupil.parts = [([0, 1, 2, 3], [Micro([at], 1) for at in range(3)])]
    pupil.totals = lambda _: Totals(4, 4, 0, 8)
    pupil.batch = lambda micro: (SimpleNamespace(rows=torch.tensor(ROWS[micro.own[0]])), None)
    pupil.drift, pupil._away = {}, [torch.tensor([0.1, 0.0]), torch.tensor([0.01])]
    pupil.losses = list(LOSSES)

    def micro_step(_batch: Any, micro: Micro, *_: Any) -> torch.Tensor:
        made = torch.zeros(len(SUMS))
        made[SUMS.index("loss")] = pupil.losses[micro.own[0]]
        return made

    pupil._micro_step = micro_step
    monkeypatch.setattr(step, "apply_gradients", lambda *_: (False, math.nan))
    monkeypatch.setattr(step.dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(step, "everyone", lambda own, _: own)
    return pupil


def test_each_micro_step_reports_its_own_rows_and_loss(pupil: Any) -> None:
    """One loss that is not finite is not those of the rows beside it; --log_rows leaves out the dummy row."""
    taken = cast(Pupil, pupil).update(0, 0)
    assert [own.tolist() for own, _ in taken.ran] == ROWS
    assert str([loss.tolist() for _, loss in taken.ran]) == "[[1.0, 1.0], [nan], [2.0, 2.0]]"
    assert taken.metrics["row_ids"] == [7, 9, 8, 6]
    # What the step came to is all of them.
    pupil.losses[1] = 3.0
    metrics = cast(Pupil, pupil).update(0, 0).metrics
    assert metrics["loss"] == 6.0
    assert metrics["decoder_drift"] == pytest.approx(0.11 / 3)
    assert metrics["decoder_drift_max"] == pytest.approx(0.1)


@pytest.mark.parametrize(("away", "said"), [(0.41, "0.13"), (math.nan, "nan")])
def test_answers_of_another_policy_end_the_run_before_the_weights_change(
    pupil: Any, away: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[Any] = []
    monkeypatch.setattr(step, "apply_gradients", lambda *given: stepped.append(given))
    pupil._away.append(torch.tensor([away]))
    with pytest.raises(UserError) as caught:
        cast(Pupil, pupil).update(0, 2)
    assert f"rollout 3: log-probabilities of decoder and training differ by {said} nats a token" in str(caught.value)
    assert not stepped
