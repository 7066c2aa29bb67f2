"""Learned targets against plain transformers and an attention written by hand, one row at a time.

T tokens of a row, H hidden, k latents a run, p first latent of a run, F features of a helper, A heads.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_forward import (  # noqa: F401  # sharp and doubled are fixtures
    CPU,
    Plain,
    Task,
    assert_same_gradients,
    counts_of,
    doubled,
    gradients,
    sharp,
)
from torch.nn import functional

from mirage_ds.data.batch import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.model.load import Loaded, Scaffold, load_model
from mirage_ds.model.loss import objective

K = 3
HEADS = 4
NAME = "target_encoder."


def load(folder: Path, **options: Any) -> Loaded:
    options = dict(dtype=torch.float32, device=CPU, checkpointing=False, scaffold=Scaffold(K, 5)) | options
    return load_model(folder, stage="scaffold", **options)


def encoder_of(folder: Path, data: Path) -> Encoder:
    return load_encoder([str(folder)], ImageFinder.beside(data, None), "scaffold", K)


def samples_of(folder: Path, data: Path, rows: tuple[int, ...]) -> list[Sample]:
    encoder, (records, _) = encoder_of(folder, data), scan(data)
    return [encoder.encode(records[row], row) for row in rows]


def backward(loaded: Loaded, encoder: Encoder, samples: list[Sample]) -> torch.Tensor:
    batch = collate(samples, 1, encoder.dummy(0))
    if loaded.tower is not None:
        batch = loaded.tower.attach(batch, not loaded.model.encodes_helpers)
    loss, _, sim = objective(loaded.model(batch), counts_of(samples), 1.0, "sample")
    assert sim == 0
    loss.backward()
    return loss.detach()


def code(row: int, column: int, width: int) -> list[float]:
    """The place of a feature: its row's sines, cosines, then its column's."""
    waves = [10_000 ** (-i / (width // 4)) for i in range(width // 4)]
    return [wave(at * one) for at in (row, column) for wave in (math.sin, math.cos) for one in waves]


def by_hand(weights: dict[str, torch.Tensor], features: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """The latents (k, H) of one helper: every query and every head by itself."""
    width = features.shape[1]
    rows, columns = grid[1] // 2, grid[2] // 2
    at = torch.tensor([code(row, column, width) for row in range(rows) for column in range(columns)])
    x = features / (features.square().mean(-1, keepdim=True) + 1e-6).sqrt() + at
    keys, values = x @ weights["key.weight"].T, x @ weights["value.weight"].T
    each, made = width // HEADS, []
    for query in weights["queries"]:
        heads = []
        for head in range(HEADS):
            here = slice(head * each, (head + 1) * each)
            share = ((keys[:, here] @ query[here]) / each**0.5).exp()
            heads.append((share[:, None] * values[:, here]).sum(0) / share.sum())
        z = torch.cat(heads) @ weights["out.weight"].T
        made.append(z / (z.square().mean() + 1e-6).sqrt() * weights["norm.weight"])
    return torch.stack(made)


class Slow:
    """Plain transformers, frozen, and the encoder's weights as leaves."""

    def __init__(self, folder: Path, data: Path, loaded: Loaded, train_vision: bool = False):
        self.plain = Plain(Task(folder, data, "stage1", K), train_vision)
        self.plain.model.model.language_model.requires_grad_(False)
        self.plain.model.lm_head.requires_grad_(False)
        named = loaded.model.target_encoder.named_parameters()
        self.weights = {n: p.detach().clone().requires_grad_() for n, p in named if not n.startswith("visual.")}

    def latents(self, sample: Sample) -> list[torch.Tensor]:
        features = self.plain.features(sample.helper_pixel_values, sample.helper_grid_thw)
        return [by_hand(self.weights, *one) for one in zip(features, sample.helper_grid_thw.tolist(), strict=True)]

    def loss(self, samples: list[Sample]) -> torch.Tensor:
        total = 0
        for sample in samples:
            # The model's own images go through the tower that stays as it is.
            x = self.plain.embed(sample).detach()
            for latents, (p, k) in zip(self.latents(sample), sample.runs, strict=True):
                x = torch.cat([x[:p], latents, x[p + k :]])
            total = total + self.plain.ce(self.plain.states(x, sample), sample).mean()
        return total / len(samples)

    def gradients(self) -> dict[str, torch.Tensor]:
        """By MirageModel's names."""
        own = {f"{NAME}{name}": one.grad for name, one in self.weights.items()}
        named = gradients(self.plain.model.model.visual)
        return own | {f"{NAME}visual.{name}": one for name, one in named.items()}


# ----------------------------------------------------------------------------------------------------------- scaffold


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_vision", [False, True])
def test_the_encoder_gets_the_loss_and_the_gradients_of_a_slow_loop(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    train_vision: bool,
    checkpointing: bool,
) -> None:
    samples = samples_of(sharp, doubled, (0, 1, 2))
    loaded = load(sharp, train_vision=train_vision, checkpointing=checkpointing)
    slow = Slow(sharp, doubled, loaded, train_vision)
    wanted = slow.loss(samples)
    wanted.backward()
    loss = backward(loaded, encoder_of(sharp, doubled), samples)
    assert abs(loss - wanted) <= 1e-5
    got = gradients(loaded.model)
    assert got.keys() == {name for name, one in loaded.model.named_parameters() if one.requires_grad}
    assert any(name.startswith(f"{NAME}visual.") for name in got) == train_vision
    assert all(name.startswith(NAME) for name in got)
    assert_same_gradients(got, slow.gradients())
    assert all(one.norm() > 0 for one in got.values())


def test_packed_rows_are_rows_alone(sharp: Path, doubled: Path) -> None:  # noqa: F811
    samples, encoder = samples_of(sharp, doubled, (0, 1, 2)), encoder_of(sharp, doubled)
    packed, alone = load(sharp), load(sharp)
    loss = backward(packed, encoder, samples)
    each = [backward(alone, encoder, [sample]) / len(samples) for sample in samples]
    assert abs(loss - sum(each)) <= 1e-6
    single = {name: one / len(samples) for name, one in gradients(alone.model).items()}
    assert_same_gradients(gradients(packed.model), single)


def test_a_rank_without_rows_trains_nothing_and_calls_everything(sharp: Path, doubled: Path) -> None:  # noqa: F811
    for train_vision in (False, True):
        loaded, encoder = load(sharp, train_vision=train_vision), encoder_of(sharp, doubled)
        batch = loaded.tower.attach(collate([], 1, encoder.dummy(0)), not loaded.model.encodes_helpers)
        loss, _, _ = objective(loaded.model(batch), counts_of(samples_of(sharp, doubled, (0,))), 1.0, "sample")
        loss.backward()
        got = gradients(loaded.model)
        assert got.keys() == {name for name, one in loaded.model.named_parameters() if one.requires_grad}
        assert all(one.norm() == 0 for one in got.values())


def test_latents_begin_with_the_size_of_hidden_states_and_differ(sharp: Path, doubled: Path) -> None:  # noqa: F811
    loaded = load(sharp)
    (sample,) = samples_of(sharp, doubled, (1,))
    with torch.no_grad():
        latents = torch.cat(Slow(sharp, doubled, loaded).latents(sample))
    norm = loaded.model.language_model.norm.weight
    assert latents.shape == (K, len(norm))
    torch.testing.assert_close(latents.norm(dim=-1), norm.norm().expand(K), rtol=0.2, atol=0)
    near = functional.cosine_similarity(latents[0], latents[1:], dim=-1)
    assert near.abs().max() < 0.9
    # One seed, one start.
    other = load(sharp, scaffold=Scaffold(K, 6)).model.target_encoder.queries
    assert torch.equal(load(sharp).model.target_encoder.queries, loaded.model.target_encoder.queries)
    assert not torch.equal(other, loaded.model.target_encoder.queries)
