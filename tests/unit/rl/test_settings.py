"""The settings of --stage rl: what is refused in a sentence before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mirage_ds.config.rl import RL_ONLY, rl_noted
from mirage_ds.config.run import RunConfig
from mirage_ds.engine.card import model_card
from mirage_ds.engine.checkpoint import STATE_FILE, _check_state
from mirage_ds.engine.save import trained_of
from mirage_ds.engine.setup import make_reference
from mirage_ds.errors import UserError
from mirage_ds.run import state
from mirage_ds.run.beforehand import check_beforehand
from mirage_ds.run.settings import find_policy


def settings(**given: Any) -> RunConfig:
    base: dict[str, Any] = dict(model="m", data_path="d", save_model_path="o", stage="rl", max_length=1000)
    return RunConfig(**base | given)


def test_a_rollout_has_prompts_answers_and_steps() -> None:
    assert (settings().rows_per_step, settings().num_generations, settings().steps_per_rollout) == (8, 8, 1)
    several = settings(prompts_per_rollout=32, updates=4, num_iterations=2)
    assert (several.rows_per_step, several.steps_per_rollout) == (32, 8)
    assert several.passes(2) == 9
    assert settings(stage="sft").steps_per_rollout == 1
    # What decides nothing of a step is not compared when a run goes on.
    noted = rl_noted(several)
    assert "judge_model_name" in noted
    assert not noted.keys() & {"rollout_rows", "judge_endpoint", "max_drift", "latent_policy"}
    assert noted.keys() < set(RL_ONLY)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_generations": 1}, "greater than or equal to 2"),
        ({"prompts_per_rollout": 6, "updates": 4}, "--updates 4 does not divide --prompts_per_rollout 6"),
        ({"global_batch_size": 8}, "--global_batch_size: a step of --stage rl has its share of --prompts_per_rollout"),
        ({"clip_low": 1.5}, "--clip_low 1.5: a ratio is never below 0"),
        ({"updates": 4, "save_every": 6}, "--save_every 6: a rollout has 4 optimizer steps"),
        ({"updates": 2, "num_iterations": 2, "max_steps": 6}, "--max_steps 6: a rollout has 4 optimizer steps"),
        ({"max_completion_length": 1000}, "--max_completion_length 1000 leaves no room for a prompt in --max_length"),
        ({"stage": "stage2", "num_generations": 5}, "--num_generations 5 is for --stage rl, this run is stage2"),
        ({"slots": "pause"}, "--slots pause: --stage rl takes latents"),
        ({"detach_latents": True}, "--detach_latents is for --stage stage2"),
        ({"bottleneck": True}, "--bottleneck is for --stage stage1 and stage2, this run is rl"),
        ({"reward": ["accurate"]}, "unknown reward 'accurate' (did you mean 'accuracy'?)"),
        ({"reward": ["accuracy"], "reward_weights": [1, 2]}, "--reward_weights: 2 weights for 1 rewards"),
        ({"prompts_per_rollout": 2}, "2 prompts a rollout (--prompts_per_rollout) are fewer than 3 ranks"),
    ],
)
def test_settings_that_make_no_run(given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises((ValidationError, UserError)) as caught:
        check_beforehand(settings(**{"save_model_path": tmp_path / "out"} | given), 3)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("trained", "given", "policy"),
    [
        ({}, None, "text"),
        ({"stage": "sft"}, None, "text"),
        ({"stage": "stage2", "latent_size": 4}, None, "through"),
        ({"stage": "stage1", "latent_size": 4, "slots": "latents"}, "replay", "replay"),
        ({"stage": "stage2", "latent_size": 4}, "text", "text"),
        ({"stage": "rl", "latent_size": 4, "latent_heads": "latent_heads.safetensors"}, None, "gaussian"),
        ({"stage": "sft", "latent_heads": "gaussian"}, None, "text"),
        ({"stage": "sft", "latent_heads": "gaussian"}, "gaussian", "--latent_policy gaussian: m was trained without"),
        ({}, "through", "--latent_policy through: m was trained without latents; train it in stage1 and stage2"),
        ({"stage": "sft", "slots": "pause"}, None, "m was trained with --slots pause: --stage rl takes a model"),
        (
            {"stage": "stage2", "latent_size": 4, "latent_passes": 0},
            None,
            "m was trained with --latent_passes: --stage rl",
        ),
        (
            {"stage": "stage2", "latent_size": 4, "bottleneck": True},
            None,
            "m was trained with --bottleneck, and answers",
        ),
        ({"stage": "stage2", "latent_size": 6}, None, "--latent_size 4: m was trained with 6 latents a block; give 6"),
    ],
)
def test_the_policy_is_that_of_the_models_training(trained: dict[str, Any], given: Any, policy: str) -> None:
    try:
        assert find_policy(settings(latent_policy=given), trained, Path("m")) == policy
    except UserError as error:
        assert str(error).startswith(policy)  # noqa: PT017  # one table of both


def test_another_task_or_reference_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "from_rank_zero", lambda make, _: make())

    def noted(weights: str, **given: Any) -> dict[str, Any]:
        (tmp_path / "model.safetensors").write_text(weights)
        run, checked = SimpleNamespace(config=settings(**given), world=None), SimpleNamespace(policy="text")
        checked.folders = [tmp_path]
        return {**state.rl_state(cast(Any, run), cast(Any, checked)), "tower": {}}

    def refused(was: dict[str, Any], now: dict[str, Any]) -> str:
        (tmp_path / STATE_FILE).write_text(json.dumps(was))
        try:
            _check_state(tmp_path, now, "--resume auto")
        except UserError as error:
            return str(error)
        return ""

    assert not refused(noted("a", beta=0.1, task="comt"), noted("a", beta=0.1, task="comt"))
    # Without a KL nothing leads back to the start.
    assert not refused(noted("a"), noted("b"))
    assert "was written with --task comt, this run has None" in refused(noted("a", task="comt"), noted("a"))
    assert "the reference of --beta" in refused(noted("a", beta=0.1), noted("b", beta=0.1))


def test_a_reference_is_put_where_it_runs() -> None:
    for stage in (0, 1, 2):
        made = make_reference(cast(Any, nn.Linear(2, 2)), {"zero_optimization": {"stage": stage}}, torch.device("meta"))
        assert {(one.device.type, one.requires_grad) for one in made.parameters()} == {("meta", False)}


@pytest.mark.parametrize(
    ("policy", "stage", "said"), [("text", "sft", "text alone"), ("through", "rl", "4 latent visual")]
)
def test_a_model_of_text_answers_is_told_apart_from_one_with_latents(policy: str, stage: str, said: str) -> None:
    state: dict[str, Any] = dict(
        stage="rl", latent_policy=policy, latent_size=4, sources=["m"], optimizer=[], step=3, rows_per_step=8, rows=9,
        data="x", train_vision=False, ce_weight=1, reduction="sample", seed=1, dtype="float32", zero_stage=3,
        world_size=2, latents=[None, "average", "cosine", False, False],
    )  # fmt: skip
    state["optimizer"] = [0] * 7
    assert trained_of(state)["stage"] == stage
    card = model_card(state)
    assert "| stage | rl |" in card
    assert said in card
