"""What --stage rl adds to a plan, against what a run asks for before its first rollout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_plan_activations import model_of, shape

from mirage_ds.engine.whole import bytes_to_decode
from mirage_ds.model.generate import Limits
from mirage_ds.plan.activations import total
from mirage_ds.plan.fit import GB, Question, judge
from mirage_ds.plan.rollout import reference, rollout_of, sampling
from mirage_ds.plan.settings import Settings, Zero3
from mirage_ds.plan.shape import sizes
from mirage_ds.plan.spec import PlanSpec


def asked(**given: Any) -> PlanSpec:
    base: dict[str, Any] = dict(model="qwen2.5-vl-7b", stage="rl", gpu_memory=80, num_generations=5)
    return PlanSpec(**base | dict(prompts_per_rollout=32, row_tokens=800, labelled=0.4) | given)


def test_prompts_are_dealt_and_answers_decoded_at_a_time() -> None:
    assert rollout_of(asked(), 8) == (20, 20, 480)
    assert rollout_of(asked(rollout_rows=6), 8) == (20, 6, 480)
    # One rank more than divides them: some have a prompt less.
    assert rollout_of(asked(), 9).answers == 20


@pytest.mark.parametrize("name", ["nano", "mid"])
@pytest.mark.parametrize(("answers", "tokens"), [(3, 4096), (3, 64), (40, 64)])
def test_sampling_takes_what_a_run_wants_free(name: str, answers: int, tokens: int) -> None:
    model = model_of(name, "rl", torch.bfloat16, False).eval()
    # 64 tokens before an answer of 64: whole blocks of the cache.
    spec = asked(
        prompts_per_rollout=answers, num_generations=1, row_tokens=64, labelled=0.4, micro_batch_tokens=tokens,
        max_completion_length=26, images=0,
    )  # fmt: skip
    prompt = rollout_of(spec, 1).prompt
    found = sampling(spec, sizes(shape_of(name)), Settings(1, 2, 4, 4, 4, Zero3()), 1)
    assert total(found) == bytes_to_decode(model, answers, prompt, Limits(26, prefill_tokens=tokens))
