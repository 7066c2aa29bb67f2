"""A step of reinforcement on two ranks under ZeRO-3 against one plain process that takes all rows at once.

One rank has nothing but a dummy in its second micro-step, and a row without latents in its first. That the one
process is right stands in tests/unit/rl/test_policies.py. k latents a block, H hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.group import Group

from mirage_ds.config.run import RunConfig
from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.engine import ds_config as ds
from mirage_ds.engine.private import backward
from mirage_ds.engine.setup import make_engine
from mirage_ds.engine.versions import gather_safely
from mirage_ds.engine.whole import whole_model
from mirage_ds.model.forward import Scores, Scoring
from mirage_ds.model.latent_heads import LatentHeads
from mirage_ds.model.load import Loaded, load_model, public_name
from mirage_ds.rl.latents import block_ratios
from mirage_ds.rl.objective import SUMS, Objective, Scored, Settings, Terms, Totals, token_terms

K, H = 2, 128
# Rows of each rank's micro-steps: with two latents and none.
BINS = ([[0, 1], [4]], [[2], []])
ALL = [row for one in BINS for micro in one for row in micro]


class Step(NamedTuple):
    """What one step came to: its sums, gradients by name, and the heads of the whole model in it."""

    sums: list[float]
    gradients: dict[str, np.ndarray]
    heads: list[np.ndarray]


def _load(folder: Path, policy: str, **options: Any) -> Loaded:
    options = dict(dtype=torch.float32, device=torch.device("cpu"), split=policy == "through") | options
    loaded = load_model(folder, stage="stage2", latent_heads=policy == "gaussian", **options)
    if loaded.model.latent_heads is not None:
        loaded.model.latent_heads.load_state_dict(_heads().state_dict())
    return loaded


def _heads() -> LatentHeads:
    torch.manual_seed(3)
    heads = LatentHeads(H)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return heads


def _batch(loaded: Loaded, folder: Path, data: Path, rows: list[int], policy: str) -> Batch:
    encoder = load_encoder([str(folder)], ImageFinder.beside(data, None), "stage2", K)
    records, passes = scan(data)[0], K + 1 if policy == "through" else 1
    samples = [encoder.encode(records[row], row) for row in rows]
    batch = loaded.tower.attach(collate(samples, passes, encoder.dummy(passes // K)))
    if policy == "through":
        return batch
    fed = [_drawn(row, len(one.runs) * K, H) for row, one in zip(rows, samples, strict=True)]
    return batch._replace(fed=torch.cat([torch.empty(0, H), *fed]))


def _drawn(row: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(row))


def _density(policy: str) -> Any:
    return policy if policy in ("gaussian", "vlpo") else None


def _terms(scores: Scores, batch: Batch, policy: str, objective: Objective, totals: Totals) -> Terms:
    """Numbers of a rollout that follow from a row's own number, wherever it runs."""
    old, advantage = scores.logp.detach().clone(), torch.zeros(len(batch.rows))
    latent_old = scores.latent_logp.detach().clone()
    for number, row in enumerate(batch.rows.tolist()):
        if row >= 0:
            mine, theirs = batch.target_sample == number, batch.latent_sample == number
            old[mine] += 0.1 * _drawn(row, int(mine.sum()))
            latent_old[theirs] += 10 * _drawn(row, int(theirs.sum()))
            advantage[number] = 1 - row / 2
    blocks = block_ratios(scores.latent_logp, latent_old, batch, H) if _density(policy) else None
    scored = Scored(scores.logp, scores.entropy, old, old - 0.1, blocks)
    return token_terms(scored, advantage, batch, totals, Settings(objective, beta=0.04, entropy=0.01))


def _totals(policy: str, batch: Batch) -> Totals:
    labels = int(batch.label_count[batch.weight > 0].sum())
    return Totals(len(ALL), labels, 3 if _density(policy) else 0, 40)


def _step(world: Any, folder: Path, data: Path, policy: str, objective: Objective) -> Step:
    from deepspeed.utils import safe_get_full_grad

    path = ds.default_path("stage2")
    config = RunConfig(model=str(folder), stage="stage2", data_path=folder, save_model_path=folder, max_grad_norm=0)
    zero = dict(stage=3, stage3_param_persistence_threshold=0, overlap_comm=False)
    values = ds.resolve({"zero_optimization": zero}, path, config, world.size)
    gather_safely(values, "cpu")
    loaded = _load(folder, policy, ds_config=values, device=world.device)
    totals = _totals(policy, _batch(loaded, folder, data, ALL, policy))
    engine, sums = make_engine(loaded.model, config, values, 2), torch.zeros(len(SUMS))
    with whole_model(engine) as plain:
        heads = [p.numpy().copy() for p in plain.latent_heads.parameters()] if plain.latent_heads else []
    for number, rows in enumerate(BINS[world.rank]):
        batch = _batch(loaded, folder, data, rows, policy)
        engine.set_gradient_accumulation_boundary(number == 1)
        scores = engine(batch, Scoring(0.8, _density(policy)))
        terms = _terms(scores, batch, policy, objective, totals)
        backward(engine, terms.loss * world.size, scores.earlier)
        engine.module.layers.round.check()
        sums += terms.sums
    torch.distributed.all_reduce(sums)
    named = [(public_name(name), p) for name, p in engine.module.named_parameters()]
    found = {name: safe_get_full_grad(p).numpy().copy() for name, p in named}
    engine.destroy()
    return Step(sums.tolist(), found, heads)


@pytest.mark.parametrize(
    ("policy", "objective"),
    [("through", "grpo"), ("replay", "gspo"), ("gaussian", "dapo"), ("vlpo", "cispo"), ("gaussian", "dr_grpo")],
)
def test_two_ranks_take_the_step_of_one_process(
    group: Group, nano: Path, mixed: Path, policy: str, objective: Objective
) -> None:
    loaded = _load(nano, policy, checkpointing=False)
    batch = _batch(loaded, nano, mixed, ALL, policy)
    assert int(batch.latent_count.sum()) // K == 3
    scores = loaded.model(batch, Scoring(0.8, _density(policy)))
    terms = _terms(scores, batch, policy, objective, _totals(policy, batch))
    terms.loss.backward()
    if scores.earlier is not None:
        scores.earlier.backward()
    wanted = {public_name(name): p.grad.numpy() for name, p in loaded.model.named_parameters()}
    assert (policy == "gaussian") == any(name.startswith("latent_heads.") and one.any() for name, one in wanted.items())
    for found in group.run(_step, nano, mixed, policy, objective):
        assert found.sums == pytest.approx(terms.sums.tolist(), rel=1e-5, abs=1e-5)
        assert found.gradients.keys() == wanted.keys()
        for name, one in wanted.items():
            assert np.linalg.norm(found.gradients[name] - one) <= 1e-5 * np.linalg.norm(one), name
        whole = [p.detach().numpy() for p in _heads().parameters()] if policy == "gaussian" else []
        assert all(np.array_equal(one, other) for one, other in zip(found.heads, whole, strict=True))
