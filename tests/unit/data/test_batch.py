"""The Batch, against a slow walk over tokens; samples are made by hand, no tokenizer involved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mirage_ds.data.batch import Batch, collate, to_device
from mirage_ds.data.sample import Sample

IGNORE = -100
Run = tuple[int, int]


def make_sample(
    row: int,
    length: int,
    runs: tuple[Run, ...] = (),
    images: tuple[int, ...] = (),
    helpers: tuple[tuple[int, int], ...] = (),
) -> Sample:
    """A row of random tokens, about half of them labels; its images' merged tokens start at position 1."""
    random = torch.Generator().manual_seed(100 + row)
    ids = torch.randint(1000 * (row + 2), 1000 * (row + 3), (length,), generator=random)
    labels = torch.where(torch.rand(length, generator=random) < 0.5, ids, IGNORE)
    labels[0] = IGNORE
    for start, k in runs:
        labels[start : start + k] = IGNORE
    labels[-1] = ids[-1]
    patches = 4 * sum(images)
    helper_patches = sum(4 * h * w for h, w in helpers)
    return Sample(
        row=row,
        input_ids=ids,
        labels=labels,
        position_ids=torch.randint(0, 99, (3, length), generator=random),
        image_positions=torch.arange(1, 1 + sum(images)),
        pixel_values=torch.rand(patches, 1176, generator=random),
        image_grid_thw=torch.tensor([[1, 2, 2 * merged] for merged in images], dtype=torch.int64).reshape(-1, 3),
        runs=runs,
        helper_pixel_values=torch.rand(helper_patches, 1176, generator=random),
        helper_grid_thw=torch.tensor([[1, 2 * h, 2 * w] for h, w in helpers], dtype=torch.int64).reshape(-1, 3),
        helper_groups=torch.tensor(
            [
                run * k + place * k // (h * w // k * k) if place < h * w // k * k else -1
                for run, ((h, w), (_, k)) in enumerate(zip(helpers, runs, strict=False))
                for place in range(h * w)
            ],
            dtype=torch.int64,
        ),
    )


def dummy(runs: int, k: int) -> Sample:
    return make_sample(-1, runs * k + 2, tuple((1 + run * k, k) for run in range(runs)))


THREE = [
    make_sample(7, 12, ((4, 3),), (2,), ((3, 3),)),
    make_sample(2, 5),
    make_sample(9, 20, ((3, 3), (10, 3)), (3, 1), ((2, 2), (1, 5))),
]


def passes_of(sample: Sample, recurrent: bool) -> list[int]:
    number, made = 0, []
    first = {start: k for start, k in sample.runs} if recurrent else {}
    left = 0
    for position in range(len(sample.input_ids)):
        left = first.get(position, left)
        if left:
            number, left = number + 1, left - 1
        made.append(number)
    return made


def check_against_slow(batch: Batch, packed: list[Sample], passes: int) -> None:
    """Compare every field that is not a mere concatenation, token by token."""
    recurrent = passes > 1
    start, place = 0, []
    for number, sample in enumerate(packed):
        place += [(number, position, start) for position in range(len(sample.input_ids))]
        start += len(sample.input_ids)
    pass_of = [number for sample in packed for number in passes_of(sample, recurrent)]
    targets, owners = [], []
    for number, one in enumerate(batch.passes):
        tokens = [i for i in range(len(place)) if pass_of[i] == number]
        assert one.tokens.tolist() == tokens
        labelled = []
        for at, token in enumerate(tokens):
            owner, position, _ = place[token]
            labels = packed[owner].labels
            if position + 1 < len(labels) and labels[position + 1] != IGNORE:
                labelled.append(at)
                targets.append(int(labels[position + 1]))
                owners.append(owner)
        assert one.labelled.tolist() == labelled
        groups = [[t for t in tokens if place[t][0] == n] for n in range(len(packed))]
        sizes = [len(group) for group in groups if group]
        # Of a sample that takes part, every token up to its last one here is a key.
        visible = [place[group[-1]][1] + 1 for group in groups if group]
        assert one.cu_q.tolist() == [0, *np.cumsum(sizes)]
        assert one.cu_k.tolist() == [0, *np.cumsum(visible)]
        assert (one.max_q, one.max_k) == (max(sizes), max(visible))
        # Fed back: the first token of each sample, in all passes but the first.
        assert one.fed.tolist() == ([0, *np.cumsum(sizes)[:-1]] if number else [])
        assert one.cu_q.dtype == one.cu_k.dtype == torch.int32
    assert len(batch.passes) == passes
    assert batch.targets.tolist() == targets
    assert batch.target_sample.tolist() == owners
    assert batch.label_count.tolist() == [int((sample.labels != IGNORE).sum()) for sample in packed]
    latents = [(n, s, k) for n, sample in enumerate(packed) for s, k in sample.runs]
    begins = [0, *np.cumsum([len(sample.input_ids) for sample in packed])]
    assert batch.latents.tolist() == [begins[n] + s + j for n, s, k in latents for j in range(k)]
    assert batch.latent_sample.tolist() == [n for n, _, k in latents for _ in range(k)]
    assert batch.latent_count.tolist() == [sum(k for _, k in sample.runs) for sample in packed]
    assert batch.cu_seqlens.tolist() == begins
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.image_positions.tolist() == [
        begins[n] + int(p) for n, sample in enumerate(packed) for p in sample.image_positions
    ]
    assert batch.rows.tolist() == [sample.row for sample in packed]
    assert batch.weight.tolist() == [1.0 if sample.row >= 0 else 0.0 for sample in packed]
    for field, axis in (("input_ids", 0), ("position_ids", 1), ("pixel_values", 0), ("image_grid_thw", 0)):
        assert torch.equal(getattr(batch, field), torch.cat([getattr(sample, field) for sample in packed], axis))
    for field in ("helper_pixel_values", "helper_grid_thw"):
        assert torch.equal(getattr(batch, field), torch.cat([getattr(sample, field) for sample in packed]))
    assert batch.image_features is None
    assert batch.helper_features is None


def test_one_pass_holds_all_tokens_and_needs_no_dummy() -> None:
    check_against_slow(collate(THREE, 1, dummy(0, 3)), THREE, 1)


def test_the_recurrent_passes_of_rows_with_one_two_and_no_runs() -> None:
    check_against_slow(collate(THREE, 7, dummy(2, 3)), THREE, 7)


@pytest.mark.parametrize("together", [0, 1, 2, 3, 5])
def test_tokens_that_run_several_times_are_scored_in_their_last_pass(together: int) -> None:
    for rows in (THREE, THREE[:2], []):
        passes = 2 * min(together, 3) + 1
        batch = collate(rows, passes, dummy(2, 3), latent_passes=together)
        packed = rows if rows == THREE or (rows and not together) else [*rows, dummy(2, 3)]
        assert batch.rows.tolist() == [sample.row for sample in packed]
        assert min(len(one.tokens) for one in batch.passes) >= 1
        last = {int(token): number for number, one in enumerate(batch.passes) for token in one.tokens}
        assert sorted(last) == list(range(len(batch.input_ids)))
        scored = [(number, int(one.tokens[at])) for number, one in enumerate(batch.passes) for at in one.labelled]
        assert all(last[token] == number for number, token in scored)
        labels = torch.cat([sample.labels for sample in packed])
        begins = np.cumsum([0, *(len(sample.input_ids) for sample in packed)])
        wanted = [i - 1 for i in range(len(labels)) if labels[i] != IGNORE and i not in begins]
        assert sorted(token for _, token in scored) == wanted
        assert batch.targets.tolist() == [int(labels[token + 1]) for _, token in scored]
        assert batch.label_count.tolist() == [int((sample.labels != IGNORE).sum()) for sample in packed]


@pytest.mark.parametrize("passes", [1, 7])
def test_text_behind_latents_does_not_see_hidden_tokens(passes: int) -> None:
    """Token by token; in which pass each runs, and what is fed back, is as without hidden ones."""
    hidden = (torch.tensor([0, 1, 2]), None, torch.tensor([1, 2]))
    samples = [one._replace(hidden=places) for one, places in zip(THREE, hidden, strict=True)]
    batch, usual = (collate(rows, passes, dummy(2, 3)) for rows in (samples, THREE))
    made, seen = torch.cat([one.tokens for one in batch.passes]).tolist(), {}
    for one, other in zip(batch.passes, usual.passes, strict=True):
        for name in ("tokens", "fed", "sources", "labelled"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        ends = zip(one.cu_q.tolist(), one.cu_q.tolist()[1:], one.cu_k.tolist(), one.cu_k.tolist()[1:], strict=False)
        sizes = []
        for q, q_end, k, k_end in ends:
            keys = [made[place] for place in one.keys[k:k_end].tolist()]
            sizes.append((q_end - q, len(keys)))
            # Causal, aligned at the end.
            seen |= {int(t): keys[: len(keys) - (q_end - q) + 1 + at] for at, t in enumerate(one.tokens[q:q_end])}
        assert (one.max_q, one.max_k) == tuple(map(max, zip(*sizes, strict=True)))
    start = 0
    for sample, places in zip(THREE, hidden, strict=True):
        latents = {p + slot for p, k in sample.runs for slot in range(k)}
        for at in range(len(sample.input_ids)):
            blind = bool(sample.runs) and at > min(latents) and at not in latents and places is not None
            wanted = [start + key for key in range(at + 1) if not (blind and key in places.tolist())]
            assert seen[start + at] == wanted
        start += len(sample.input_ids)


def test_a_batch_of_one() -> None:
    check_against_slow(collate(THREE[:1], 4, dummy(1, 3)), THREE[:1], 4)


def test_a_dummy_of_weight_zero_is_appended_only_where_a_pass_would_be_empty() -> None:
    filler = dummy(2, 3)
    for rows, appended in ((THREE, False), (THREE[2:], False), (THREE[:2], True), (THREE[1:2], True)):
        batch = collate(rows, 7, filler)
        check_against_slow(batch, [*rows, filler] if appended else rows, 7)
        assert min(len(one.tokens) for one in batch.passes) >= 1


@pytest.mark.parametrize(("passes", "runs"), [(1, 0), (7, 2)])
def test_an_empty_batch_is_the_dummy_alone(passes: int, runs: int) -> None:
    batch = collate([], passes, dummy(runs, 3))
    check_against_slow(batch, [dummy(runs, 3)], passes)
    assert (batch.weight.tolist(), batch.rows.tolist()) == ([0.0], [-1])


def test_the_last_token_of_a_row_predicts_nothing_even_where_the_next_row_begins_with_a_label() -> None:
    first, second = THREE[1], THREE[1]._replace(labels=THREE[1].input_ids.clone())
    batch = collate([first, second], 1, dummy(0, 3))
    assert int(second.labels[0]) not in batch.targets.tolist()
    assert len(batch.targets) == int((first.labels != IGNORE).sum()) + len(second.labels) - 1


def test_pooled_targets_are_the_means_of_each_helpers_own_features() -> None:
    """Helpers of 9, 4 and 5 merged features, k = 3: the last 0, 1 and 2 are dropped."""
    batch = collate(THREE, 1, dummy(0, 3))
    features = torch.rand(18, 6, generator=torch.Generator().manual_seed(1))
    slow, at = [], 0
    for count in (9, 4, 5):
        for group in range(3):
            size = count // 3
            slow.append(features[at + group * size : at + (group + 1) * size].mean(0))
        at += count
    pooled = torch.zeros(len(batch.latents), 6).index_add(0, batch.pool_to, features[batch.pool_from])
    # Sums in another order than mean(): equal to a few units in the last place.
    torch.testing.assert_close(pooled / batch.pool_size[:, None], torch.stack(slow), rtol=1e-6, atol=1e-6)


def test_rows_without_helpers_have_nothing_to_pool() -> None:
    none = {"helper_grid_thw": torch.empty(0, 3, dtype=torch.int64), "helper_groups": torch.empty(0, dtype=torch.int64)}
    bare = [sample._replace(**none) for sample in THREE]
    batch = collate(bare, 7, dummy(2, 3))
    assert len(batch.pool_from) == len(batch.pool_to) == len(batch.pool_size) == 0
    assert len(batch.latents) == 9


def test_to_device_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = collate(THREE, 7, dummy(2, 3))
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    tensors = [part for part in moved if isinstance(part, torch.Tensor)]
    tensors += [part for one in moved.passes for part in one if isinstance(part, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == 19 + 7 * 7
    assert moved.image_features is None
    assert [one.max_k for one in moved.passes] == [one.max_k for one in batch.passes]
