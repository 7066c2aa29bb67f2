"""The index of a records file and the loader's micro-batches, against each row encoded by itself."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.indices import selected, two_a_block

from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import FeatureStore, KeptFeatures, ShardWriter
from mirage_ds.data.loader import Loader
from mirage_ds.data.pack import Planner
from mirage_ds.data.record import RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import Sample
from mirage_ds.data.selection import Selection
from mirage_ds.data.ship import ship
from mirage_ds.errors import UserError


@pytest.fixture(scope="module")
def encoder(encoder_for: Callable[..., Encoder], mixed: Path) -> Encoder:
    return encoder_for("stage2", 2, beside=mixed)


@pytest.fixture(scope="module")
def samples(mixed: Path, encoder: Encoder) -> list[Sample]:
    return [encoder.encode(record, row) for row, record in enumerate(scan(mixed)[0])]


def test_the_index_counts_what_each_row_encodes_to(mixed: Path, encoder: Encoder, samples: list[Sample]) -> None:
    index = selected(mixed, encoder, 10_000, 0)
    assert index.row_ids.tolist() == list(range(12))
    assert index.tokens.tolist() == [len(sample.input_ids) for sample in samples]
    assert index.labels.tolist() == [int((sample.labels != -100).sum()) for sample in samples]
    assert index.runs.tolist() == [1, 1, 0, 0] * 3
    assert index.latents.tolist() == [sum(k for _, k in sample.runs) for sample in samples]
    assert (index.dropped, index.dropped_share) == (0, 0)


def test_rows_above_the_limit_are_dropped_and_counted(mixed: Path, encoder: Encoder, samples: list[Sample]) -> None:
    lengths = [len(sample.input_ids) for sample in samples]
    limit = sorted(lengths)[8]
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    assert 0 < len(kept) < 12
    index = selected(mixed, encoder, limit, 1)
    assert index.row_ids.tolist() == kept
    assert index.tokens.tolist() == [lengths[row] for row in kept]
    assert index.dropped == 12 - len(kept)
    share = (12 - len(kept)) / 12
    assert index.dropped_share == share
    assert selected(mixed, encoder, limit, share).dropped == 12 - len(kept)
    with pytest.raises(UserError) as caught:
        selected(mixed, encoder, limit, share - 0.01)
    for part in (
        f"{12 - len(kept)} of 12 rows",
        f"--max_length {limit}",
        f"longest has {max(lengths)}",
        "--max_dropped_share",
    ):
        assert part in str(caught.value)


def test_a_file_whose_rows_are_all_too_long_is_refused_whatever_share_is_allowed(mixed: Path, encoder: Encoder) -> None:
    with pytest.raises(UserError, match=r"no usable row: all 12 are longer than --max_length 10 \(the longest has"):
        selected(mixed, encoder, 10, 1)


@pytest.fixture
def spoilt(mixed: Path, tmp_path: Path) -> Path:
    """A copy of the mixed rows whose files a test may break."""
    shutil.copytree(mixed.parent, tmp_path / "copy")
    return tmp_path / "copy" / mixed.name


def test_the_first_fault_is_said_and_the_others_are_counted(spoilt: Path, encoder_for: Callable[..., Encoder]) -> None:
    lines = spoilt.read_text().splitlines()
    lines[3] = "{broken"
    lines[6] = json.dumps({"text_input": "q", "text_output": " "})
    spoilt.write_text("\n" + "\n".join(lines))
    image = spoilt.parent / "in2.png"
    image.write_bytes(image.read_bytes()[:200])
    (spoilt.parent / "in8.png").unlink()
    with pytest.raises(UserError) as caught:
        selected(spoilt, encoder_for("stage2", 2, beside=spoilt), 10_000, 1)
    # Line 1 is blank: row 2 is line 4. A broken image is found although its header still reads.
    said = str(caught.value)
    assert said.startswith(f"{spoilt}: line 4, image_input: image {image} cannot be decoded (")
    assert said.endswith(f"(and 3 more: `mirage-ds data check {spoilt}` lists them)")


def test_a_single_fault_is_said_without_a_count(spoilt: Path, encoder_for: Callable[..., Encoder]) -> None:
    (spoilt.parent / "in8.png").unlink()
    with pytest.raises(UserError, match=r"line 9, image_input: no image 'in8.png': looked for .*--image_root$"):
        selected(spoilt, encoder_for("stage2", 2, beside=spoilt), 10_000, 1)


def test_helpers_are_read_in_stage1_only(spoilt: Path, encoder_for: Callable[..., Encoder]) -> None:
    rows = [json.loads(line) for line in spoilt.read_text().splitlines()]
    spoilt.write_text("".join(json.dumps(row) + "\n" for row in rows if "image_output" in row))
    (spoilt.parent / "out4.png").write_bytes(b"")
    assert len(selected(spoilt, encoder_for("stage2", 2, beside=spoilt), 10_000, 1).row_ids) == 6
    with pytest.raises(UserError, match=r"line 3, image_output: image .*out4\.png cannot be decoded"):
        selected(spoilt, encoder_for("stage1", 2, beside=spoilt), 10_000, 1)


def planner_for(index: Selection, world: int) -> Planner:
    return Planner(index.tokens, index.row_ids, 5, world, int(index.tokens.max()) * 2, None, 42)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_rank_gets_its_planned_rows_in_every_micro_step(
    world: int, workers: int, mixed: Path, encoder: Encoder, samples: list[Sample]
) -> None:
    index = selected(mixed, encoder, len(samples[-1].input_ids) - 1, 1)
    assert index.dropped
    planner = planner_for(index, world)
    seen: dict[int, list[int]] = {1: [], 2: []}
    walked = set()
    for rank in range(world):
        plans = []
        for plan, batches in Loader(index.rows, encoder, planner, rank, two_a_block, workers).steps(1, 3):
            plans.append(plan.step)
            made = list(batches)
            assert len(made) == plan.micro_steps == planner.plan(plan.step).micro_steps
            for batch, micro in zip(made, plan.bins, strict=True):
                rows = [row for row in batch.rows.tolist() if row >= 0]
                assert rows == micro[rank]
                assert batch.rows.tolist() in (rows, [*rows, -1])
                count = sum(len(samples[row].input_ids) for row in rows)
                expected = torch.cat([torch.empty(0, dtype=torch.int64), *(samples[row].input_ids for row in rows)])
                assert torch.equal(batch.input_ids[:count], expected)
                # As many as the deepest row of any rank needs in this micro-step.
                deepest = max(sum(k for _, k in samples[row].runs) for rows in micro for row in rows)
                assert len(batch.passes) == deepest + 1
                walked.add(deepest + 1)
                seen[plan.step] += rows
        assert plans == [1, 2]
    assert 3 in walked
    for step, rows in seen.items():
        assert sorted(rows) == sorted(int(index.row_ids[place]) for place in planner.rows_of(step))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_met_while_training_is_one_sentence_with_its_line(
    workers: int, spoilt: Path, encoder_for: Callable[..., Encoder]
) -> None:
    encoder = encoder_for("stage2", 2, beside=spoilt)
    index = selected(spoilt, encoder, 10_000, 0)
    (spoilt.parent / "in4.png").unlink()
    plans = Planner(index.tokens, np.asarray(index.row_ids), 12, 1, 10_000, None, 0)
    ((_, batches),) = Loader(index.rows, encoder, plans, 0, two_a_block, workers).steps(0, 1)
    with pytest.raises(UserError, match=r"^record on line 5, image_input: no image 'in4\.png': looked for"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_features_come_instead_of_pixels(
    workers: int, spoilt: Path, encoder_for: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = encoder_for("stage2", 2, beside=spoilt)
    index = selected(spoilt, encoder, 10_000, 0, keep=["image_input"])
    images = index.rows.images["image_input"]
    assert images.starts.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    store = FeatureStore(tmp_path / "features", {}, 3, torch.float32)
    writer = ShardWriter(store)
    for number, (key, size) in enumerate(zip(images.keys, images.sizes, strict=True)):
        writer.add(key, torch.full((int(size), 3), float(number)))
    writer.flush()
    store.add(store.opened(writer.written))
    # Nobody opens them any more.
    for image in spoilt.parent.glob("in*.png"):
        image.unlink()
    kept = {"image_input": KeptFeatures(images, store)}
    loader = Loader(index.rows, encoder, planner_for(index, 1), 0, two_a_block, workers, kept)
    batches = [batch for _, micros in loader.steps(0, 2) for batch in micros]
    assert sum(len(batch.rows) for batch in batches) >= 10
    for batch in batches:
        rows = [row for row in batch.rows.tolist() if row >= 0]
        expected = [torch.full((int(images.sizes[row // 2]), 3), row // 2.0) for row in rows if row % 2 == 0]
        assert batch.image_features is not None
        assert torch.equal(batch.image_features, torch.cat([torch.empty(0, 3), *expected]))
        assert len(batch.image_positions) == len(batch.image_features)
        assert batch.pixel_values.numel() == 0


def test_an_image_of_another_size_than_its_kept_features_is_said(mixed: Path, encoder: Encoder) -> None:
    record = scan(mixed)[0][0]
    layout = encoder.lay_out(record)
    right = encoder.measure_of(layout).images[0]
    assert encoder.fill(layout, record, 0, torch.zeros(right, 3)).image_features is not None
    with pytest.raises(RecordError, match=r"line 1, image_input: an image changed its size since it was measured"):
        encoder.fill(layout, record, 0, torch.zeros(right + 1, 3))


def test_a_batch_travels_as_one_tensor(mixed: Path, encoder: Encoder, samples: list[Sample]) -> None:
    batch = collate(samples[:3], 3, encoder.dummy(1))
    awkward = (torch.tensor(3.5), torch.ones(1, dtype=torch.int64).expand(4), torch.arange(12).view(3, 4).T, None, "x")
    odd = (torch.tensor([True, False, True]), torch.randn(5).to(torch.bfloat16), torch.empty(0, 3), awkward)
    shipment = ship((batch, odd))
    assert isinstance(shipment.content, torch.Tensor)
    with pytest.raises(AssertionError, match="a tensor"):
        no_tensor((batch, odd))
    no_tensor(shipment.tree)
    made, others = pickle.loads(pickle.dumps(shipment)).unpack()
    assert isinstance(made, Batch)
    assert isinstance(made.passes, tuple)
    equal((made, others), (batch, odd))


def no_tensor(tree: Any) -> None:
    assert not isinstance(tree, torch.Tensor), "a tensor"
    for part in tree if isinstance(tree, tuple) else ():
        no_tensor(part)


def equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, tuple):
        for left, right in zip(one, other, strict=True):
            equal(left, right)
    else:
        assert one == other
