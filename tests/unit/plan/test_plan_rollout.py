"""What --stage rl adds to a plan, against what a run asks for before its first rollout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_plan_activations import model_of, shape

from mirage_ds.engine.whole import bytes_to_decode
from mirage_ds.model.load import described
from mirage_ds.model.slots import Limits
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
    found = sampling(spec, sizes(described(shape(name), name)), Settings(1, 2, 4, 4, 4, Zero3()), 1)
    assert total(found) == bytes_to_decode(model, answers, prompt, Limits(26, prefill_tokens=tokens))


def test_a_kl_holds_the_starts_weights_and_a_rollout_takes_time() -> None:
    judged = {}
    for beta in (0.0, 0.01):
        question = Question(asked(beta=beta))
        judged[beta] = {path.stem: judge(question, path) for path in question.paths}
    without, held = judged[0.0], judged[0.01]
    model = Question(asked()).model
    # Sharded under ZeRO-3, a copy a rank elsewhere; 7.62 B elements of 2 bytes.
    for name, size in (("zero3_kept", 15.23 / 8), ("zero2", 15.23)):
        assert (held[name].held.gpu - without[name].held.gpu) / GB == pytest.approx(size, rel=1e-3)
    assert reference(asked(beta=1), model, without["zero2"].settings, 8) == 2 * model.text
    # Where weights are released, sampling gathers all of them.
    whole = "weights, whole while answers are sampled"
    assert (without["zero3"].held.sampling[whole], without["zero3_kept"].held.sampling[whole]) == (2 * model.text, 0)
    # 256 tokens, each of which reads 15.2 GB of weights at 3.35 TB/s, and some cache: 1.2 s.
    seconds = without["zero3_kept"].step.seconds
    assert seconds["sampling tokens"] == pytest.approx(256 * 15.23e9 / 3.35e12, rel=0.1)
    # A forward is a quarter of the update's work; the update itself gives the old log-probabilities.
    more = set(held["zero3_kept"].step.seconds.items()) - set(seconds.items())
    assert more == {("scoring by the reference", seconds["arithmetic"] / 4)}
    assert "sampling tokens" not in judge(Question(asked(stage="stage2")), question.paths[0]).step.seconds


def test_gaussian_holds_heads_and_recorded_latents() -> None:
    """H · H + H + H + 1 elements more, one pass in place of k + 1, and 160 blocks of 4 latents in a host's memory."""
    through, gaussian = (Question(asked(latent_policy=policy)) for policy in ("through", "gaussian"))
    heads, latents = 3584 * 3584 + 3584 + 3584 + 1, "recorded latents of a rollout, a copy a rank"
    assert gaussian.model.text - through.model.text == heads
    assert [len(one.micro.passes) for one in (through, gaussian)] == [5, 1]
    held = [{path.stem: judge(one, path).held for path in one.paths} for one in (through, gaussian)]
    for name, each in (("zero2", (2, 4 / 8, 4 / 8, 8 / 8)), ("zero3", (2 / 8, 4 / 8, 4 / 8, 8 / 8))):
        terms = [one[name].states.gpu for one in held]
        for word, size in zip(("parameters", "gradients, summed", "master", "moments"), each, strict=True):
            before, after = (sum(size for key, size in one.items() if key.startswith(word)) for one in terms)
            # Each of few parameters or groups is padded.
            assert after - before == pytest.approx(size * heads, abs=200), (name, word)
        whole = "weights, whole while answers are sampled"
        before, after = (one[name].sampling[whole] for one in held)
        assert after - before == (2 * heads if name == "zero3" else 0)
        assert [one[name].host.get(latents) for one in held] == [None, 32 * 5 * 4 * 3584 * 2 * 8]
    # A KL's reference is opened with them too. Other recorded latents need no heads; text has none.
    settings = judge(gaussian, gaussian.paths[0]).settings._replace(stage=2)
    given = asked(beta=0.01, latent_policy="gaussian")
    assert reference(given, gaussian.model, settings, 8) - reference(given, through.model, settings, 8) == 2 * heads
    for policy, held_here in (("replay", True), ("vlpo", True), ("text", False)):
        other = Question(asked(latent_policy=policy))
        assert other.model == through.model
        assert (latents in judge(other, other.paths[0]).held.host) == held_here


def test_a_rollout_that_is_too_large_is_named() -> None:
    question = Question(asked(num_generations=1024, max_completion_length=2048, micro_batch_tokens=8192))
    plans = {path.stem: judge(question, path) for path in question.paths}
    assert str(plans["zero3_kept"].problem).startswith("keys and values of 4096 answers, ")
    fewer = Question(asked(num_generations=1024, max_completion_length=2048, rollout_rows=64))
    assert judge(fewer, next(path for path in fewer.paths if path.stem == "zero3_kept")).problem is None
