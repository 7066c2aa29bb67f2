"""The packed forward and the objectives against a slow loop over plain transformers, all policies and objectives.

N rows, M sampled tokens, L latents, B blocks, H hidden, k latents a block.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from slow_loop import Drawn, Row, Slow, loss_of
from test_forward import Plain, Task, assert_same_gradients, doubled, gradients, sharp  # noqa: F401  # two are fixtures

from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.sample import Sample
from mirage_ds.model.forward import MirageModel, Scores, Scoring
from mirage_ds.rl.latents import block_ratios
from mirage_ds.rl.objective import SUMS, Objective, Scored, Settings, Terms, Totals, token_terms

K, TEMPERATURE, SIGMA, LONGEST = 3, 0.8, 0.3, 40
# Two blocks, one, two and none; the third's answer is masked.
ROWS, ADVANTAGES, MASKED = (0, 1, 2, 3), (0.9, -1.1, 0.7, -0.5), 2
POLICIES = ("through", "replay", "gaussian", "vlpo")


def settings_of(objective: Objective) -> Settings:
    high = 1.05 if objective == "cispo" else 0.03
    return Settings(objective, 0.02, high, beta=0.04, entropy=0.01)


def heads_of(width: int, policy: str) -> dict[str, torch.Tensor]:
    """Heads that have learnt something."""
    torch.manual_seed(3)
    made = {"mean.weight": 0.02 * torch.randn(width, width), "mean.bias": 0.02 * torch.randn(width)}
    made |= {"log_sigma.weight": 0.02 * torch.randn(1, width), "log_sigma.bias": 0.3 * torch.randn(1)}
    return made if policy == "gaussian" else {}


def near(number: torch.Tensor, spread: float) -> float:
    return number.item() + spread * torch.randn(()).item()


def rollout(slow: Slow, samples: list[Sample]) -> tuple[list[Row], list[Drawn]]:
    """Latents near what the model makes of them, and policies near the model: some ratios are clipped, some are not."""
    torch.manual_seed(4)
    rows, drawn = [], []
    for number, sample in enumerate(samples):
        latents = slow.draw(sample)
        row = slow.row(sample, latents)
        old, reference = ([near(one, spread) for one in row.logp] for spread in (0.05, 0.2))
        old_latents = [near(one, 2.0) for block in row.blocks for one in block]
        rows.append(row)
        drawn.append(Drawn(latents, old, reference, old_latents, ADVANTAGES[number], number == MASKED))
    return rows, drawn


def packed(task: Task, samples: list[Sample], drawn: list[Drawn], policy: str, loaded) -> Batch:
    batch = task.pack(samples, 2) if policy == "through" else collate(samples, 1, samples[0])
    batch = task.attach(loaded, batch)
    # The dummy, if there is one, is masked already.
    batch.weight[MASKED] = 0
    return batch if policy == "through" else batch._replace(fed=torch.cat([one.latents for one in drawn]))


def in_order_of(batch: Batch, per_row: list[list[float]]) -> torch.Tensor:
    """Put numbers of each row's tokens where batch.targets has them: a row's own stay in order, rows do not."""
    left = [iter(one) for one in per_row]
    return torch.tensor([next(left[of]) if of < len(left) else 0.0 for of in batch.target_sample.tolist()])


def terms_of(scores: Scores, batch: Batch, drawn: list[Drawn], settings: Settings, reduce: str, width: int) -> Terms:
    dummies = [0.0] * (len(batch.weight) - len(drawn))
    scored, totals = bool(scores.latent_logp.requires_grad), totals_of(batch)
    blocks = None
    if scored:
        old = torch.tensor([number for one in drawn for number in one.old_latents], dtype=torch.float64)
        blocks = block_ratios(scores.latent_logp, old, batch, width, reduce)
    else:
        totals = totals._replace(blocks=0)
    old, reference = (in_order_of(batch, [getattr(one, name) for one in drawn]) for name in ("old", "reference"))
    advantage = torch.tensor([one.advantage for one in drawn] + dummies)
    return token_terms(Scored(scores.logp, scores.entropy, old, reference, blocks), advantage, batch, totals, settings)


def totals_of(batch: Batch) -> Totals:
    kept = batch.weight > 0
    blocks = int(batch.latent_count[kept].sum()) // K
    return Totals(len(ROWS), int(batch.label_count[kept].sum()), blocks, LONGEST)


def load(task: Task, policy: str, heads: dict[str, torch.Tensor], **options: object) -> tuple[object, MirageModel]:
    loaded = task.load(latent_heads=policy == "gaussian", **options)
    if heads:
        loaded.model.latent_heads.load_state_dict(heads)
    return loaded, loaded.model


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_equals_a_slow_loop_over_plain_transformers(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    policy: str,
    reduce: str,
) -> None:
    if reduce == "sum" and policy in ("through", "replay"):
        pytest.skip("has no ratio of latents")
    task = Task(sharp, doubled, "stage2", K)
    samples, density = task.samples(ROWS), policy if policy in ("gaussian", "vlpo") else None
    width = Plain(task).model.config.get_text_config().hidden_size
    slow = Slow(task, policy, TEMPERATURE, SIGMA, heads_of(width, policy))
    # A sum over H numbers amplifies float32's rounding of h by √H / σ: more than gradients are compared with.
    dtype = torch.float64 if reduce == "sum" else torch.float32
    slow.plain.model.to(dtype)
    rows, drawn = rollout(slow, samples)
    # Once as it is trained by default; then in two backwards where there are several passes, without checkpointing.
    for again in (False, True):
        loaded, model = load(task, policy, heads_of(width, policy), checkpointing=not again, split=again, dtype=dtype)
        batch = packed(task, samples, drawn, policy, loaded)
        clipped = set()
        for objective in get_args(Objective):
            settings = settings_of(objective)
            wanted = loss_of(rows, drawn, settings, LONGEST, reduce, density is not None)
            for one in (slow.plain.model, model):
                one.zero_grad()
            for one in slow.heads.values():
                one.grad = None
            wanted.backward(retain_graph=True)
            scores = model(batch, Scoring(TEMPERATURE, density, SIGMA))
            terms = terms_of(scores, batch, drawn, settings, reduce, width)
            terms.loss.backward()
            if scores.earlier is not None:
                scores.earlier.backward()
            model.layers.round.check()
            assert abs(terms.loss.item() - wanted.item()) <= 1e-5
            assert_same_gradients(gradients(model), slow.gradients())
            clipped |= {name for name, number in zip(SUMS, terms.sums.tolist(), strict=True) if number}
        # Else the test would pass without clipping.
        names = {"clipped_low", "clipped_high"}
        assert names <= clipped
        assert density is None or {"blocks", "latent_ratio"} <= clipped
