"""Learned targets against plain transformers and an attention written by hand, one row at a time.

T tokens of a row, H hidden, k latents a run, p first latent of a run, F features of a helper, A heads.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import OTHERS, write
from test_forward import (  # noqa: F401  # sharp and doubled are fixtures
    CPU,
    Plain,
    Task,
    assert_same_gradients,
    counts_of,
    doubled,
    gradients,
    sharp,
    sharpen,
)
from torch.nn import functional

from mirage_ds.data.batch import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.load import load_encoder
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.errors import UserError
from mirage_ds.model.folder import resolve_folder
from mirage_ds.model.load import Loaded, Scaffold, load_model
from mirage_ds.model.loss import objective
from mirage_ds.model.targets import describe_encoder, load_targets, whole_tensors, write_encoder

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


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_get_them_too(doubled: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Also one whose tower has features for deeper layers, which a latent does not get."""
    folder = write(name, tmp_path / name)
    sharpen(folder)
    samples, loaded = samples_of(folder, doubled, (0, 1, 2)), load(folder)
    slow = Slow(folder, doubled, loaded)
    wanted = slow.loss(samples)
    wanted.backward()
    loss = backward(loaded, encoder_of(folder, doubled), samples)
    assert abs(loss - wanted) <= 1e-5
    assert_same_gradients(gradients(loaded.model), slow.gradients())


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
    assert near.abs().max() < 0.95
    # One seed, one start.
    other = load(sharp, scaffold=Scaffold(K, 6)).model.target_encoder.queries
    assert torch.equal(load(sharp).model.target_encoder.queries, loaded.model.target_encoder.queries)
    assert not torch.equal(other, loaded.model.target_encoder.queries)


# ------------------------------------------------------------------------------------------ learned targets in stage 1


def saved(folder: Path, out: Path, loaded: Loaded, train_vision: bool = False) -> Path:
    """Save an encoder as a run does; with a tower of its own, one that is not the model's."""
    encoder = loaded.model.target_encoder
    if train_vision:
        with torch.no_grad():
            for number, weight in enumerate(encoder.visual.parameters()):
                weight.mul_(1 + 0.05 * (number % 3))
    tower = None if train_vision else loaded.tower.tower
    note = describe_encoder(loaded.config, K, tower, [str(folder)])
    write_encoder(whole_tensors(encoder, keep=True), out, {**note, "step": 3})
    return out


def stage1_samples(folder: Path, data: Path, rows: tuple[int, ...]) -> list[Sample]:
    return Task(folder, data, "stage1", K).samples(rows)


@pytest.mark.parametrize("train_vision", [False, True])
def test_saved_targets_are_the_encoders_latents(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    tmp_path: Path,
    train_vision: bool,
) -> None:
    loaded = load(sharp, train_vision=train_vision)
    folder = saved(sharp, tmp_path / "targets", loaded, train_vision)
    assert sorted(file.name for file in folder.iterdir()) == ["latent_targets.json", "latent_targets.safetensors"]
    task = Task(sharp, doubled, "stage1", K)
    stage1 = task.load()
    targets = load_targets(folder, stage1.config, K, stage1.tower)
    assert (targets.tower is stage1.tower) != train_vision
    samples = stage1_samples(sharp, doubled, (0, 1, 2))
    slow = Slow(sharp, doubled, loaded)
    if train_vision:
        slow.plain.model.model.visual.load_state_dict(loaded.model.target_encoder.visual.state_dict())
    with torch.no_grad():
        wanted = torch.cat([one for sample in samples for one in slow.latents(sample)])
        batch = stage1.tower.attach(targets.attach(task.pack(samples)))
        _, traced = stage1.model.trace(batch)
    torch.testing.assert_close(traced.inputs[batch.latents], wanted, rtol=0, atol=1e-5)
    pooled = stage1.tower.attach(task.pack(samples))
    assert (stage1.model.trace(pooled)[1].inputs[batch.latents] - wanted).abs().max() > 0.1


@pytest.mark.parametrize("reduction", ["sample", "token"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_own_states_are_fed_and_pulled_to_the_targets(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    tmp_path: Path,
    distance: str,
    checkpointing: bool,
    reduction: str,
) -> None:
    first = load(sharp)
    folder, gamma = saved(sharp, tmp_path / "targets", first), 0.5
    samples = stage1_samples(sharp, doubled, (0, 1, 2))
    slow, rows = Slow(sharp, doubled, first), []
    slow.plain.model.model.language_model.requires_grad_(True)
    slow.plain.model.lm_head.requires_grad_(True)
    for sample in samples:
        # A whole pass for each latent, from nothing.
        hidden, _ = slow.plain.recur(sample)
        far = []
        for target, (p, k) in zip(slow.latents(sample), sample.runs, strict=True):
            for j in range(k):
                z, g = hidden[p - 1 + j], target[j].detach()
                far.append((z - g).square().mean() if distance == "l2" else 1 - z @ g / (z.norm() * g.norm()))
        rows.append((slow.plain.ce(hidden, sample), torch.stack(far)))
    if reduction == "sample":
        wanted = sum(gamma * ce.mean() + far.mean() for ce, far in rows) / len(rows)
    else:
        ce, far = (torch.cat(each) for each in zip(*rows, strict=True))
        wanted = gamma * ce.mean() + far.mean()
    wanted.backward()
    task = Task(sharp, doubled, "stage1", K)
    loaded = task.load(latent_loss=distance, feed="own", checkpointing=checkpointing, reduction=reduction)
    targets = load_targets(folder, loaded.config, K, loaded.tower)
    batch = loaded.tower.attach(targets.attach(collate(samples, 2 * K + 1, encoder_of(sharp, doubled).dummy(2))))
    for split in (False, True):
        loaded.model.how.split = split
        loaded.model.zero_grad()
        sums = loaded.model(batch)
        loss, _, _ = objective(sums, counts_of(samples), gamma, reduction)
        loss.backward()
        if split:
            sums.earlier.backward()
        loaded.model.layers.round.check()
        assert abs(loss - wanted) <= 1e-5 * max(1.0, float(wanted))
        assert_same_gradients(gradients(loaded.model), slow.plain.gradients())


def test_a_row_beside_deeper_ones_of_another_rank_is_the_row_alone(
    sharp: Path,  # noqa: F811
    doubled: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The dummy that keeps a rank in step has latents and no helper: it adds nothing."""
    folder = saved(sharp, tmp_path / "targets", load(sharp))
    (one,) = stage1_samples(sharp, doubled, (1,))
    encoder, found = encoder_of(sharp, doubled), []
    for rows, passes in (([one], K + 1), ([one], 2 * K + 1), ([], K + 1)):
        loaded = Task(sharp, doubled, "stage1", K).load(latent_loss="cosine", feed="own")
        targets = load_targets(folder, loaded.config, K, loaded.tower)
        batch = loaded.tower.attach(targets.attach(collate(rows, passes, encoder.dummy(passes // K))))
        loss, _, _ = objective(loaded.model(batch), counts_of([one]), 0.5, "sample")
        loss.backward()
        found.append((loss.detach(), gradients(loaded.model)))
    (alone, wanted), (beside, got), (idle, none) = found
    assert abs(alone - beside) <= 1e-6
    assert_same_gradients(got, wanted)
    assert idle == 0
    assert none.keys() == wanted.keys()
    assert all(gradient.norm() == 0 for gradient in none.values())


def test_targets_of_another_model_are_refused(sharp: Path, nano: Path, tmp_path: Path) -> None:  # noqa: F811
    loaded = load(sharp)
    folder = saved(sharp, tmp_path / "targets", loaded)
    with pytest.raises(UserError, match=f"makes {K} latents a helper, and a block has 2 here; give targets"):
        load_targets(folder, loaded.config, 2, loaded.tower)
    other = load(nano)
    with pytest.raises(UserError, match=r"reads the vision tower of .*sharp, and this model's has other weights"):
        load_targets(folder, other.config, K, other.tower)
    note = json.loads((folder / "latent_targets.json").read_text())
    for changed in ({"width": 64}, {"model_type": "qwen2_vl"}):
        (folder / "latent_targets.json").write_text(json.dumps(note | changed))
        with pytest.raises(UserError, match=r"made for a qwen2.* of width .*give targets of this model"):
            load_targets(folder, loaded.config, K, loaded.tower)
    (folder / "latent_targets.json").write_text(json.dumps(note | {"format": 0}))
    with pytest.raises(UserError, match="not of this version"):
        load_targets(folder, loaded.config, K, loaded.tower)
    (folder / "latent_targets.json").unlink()
    with pytest.raises(UserError, match="give a folder that --stage scaffold saved"):
        load_targets(folder, loaded.config, K, loaded.tower)


def test_a_folder_of_targets_is_no_model(sharp: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = saved(sharp, tmp_path / "targets", load(sharp))
    with pytest.raises(UserError, match=r"--load_model_path .*holds learned targets .* give it as --latent_targets"):
        resolve_folder(str(folder), "--load_model_path", None)


def test_a_save_that_breaks_off_leaves_no_folder_that_looks_whole(
    sharp: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load(sharp)
    folder = saved(sharp, tmp_path / "targets", loaded)
    before = (folder / "latent_targets.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mirage_ds.model.targets.write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        saved(sharp, folder, loaded)
    assert (folder / "latent_targets.safetensors").read_bytes() == before
    assert (folder / "latent_targets.json").is_file()
    monkeypatch.undo()
    monkeypatch.setattr("mirage_ds.model.targets.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        saved(sharp, folder, loaded)
    assert not (folder / "latent_targets.json").exists()
