"""Kept features: what comes back is what went in, and what is broken or foreign is never taken for whole."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import FeatureStore, ImageKeys, KeptFeatures, ShardWriter, image_key, image_keys
from mirage_ds.data.loader import build_index
from mirage_ds.errors import UserError
from mirage_ds.keep_features import _Images

WIDTH = 8
SPACE = {"tower": "a"}


def features(number: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number)).to(dtype)


def key(number: int) -> tuple[int, int]:
    return (number * 7919 + 1) % 13, number


def fill(store: FeatureStore, numbers: range, shard_bytes: int = 1 << 20) -> None:
    writer = ShardWriter(store, shard_bytes)
    for number in numbers:
        writer.add(key(number), features(number, 1 + number % 4, store.dtype))
    writer.flush()


def keys_of(numbers: range) -> np.ndarray:
    return np.array([key(number) for number in numbers], dtype=np.uint64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_image_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    # 13 high words for 50 keys: the low word decides.
    store = FeatureStore(tmp_path, SPACE, WIDTH, dtype)
    fill(store, range(50), shard_bytes=300)
    assert store.refresh() == []
    assert len(store.files) > 5
    assert not store.missing(keys_of(range(50))).any()
    for number in range(50):
        found = store.get(key(number))
        assert found.dtype == dtype
        assert torch.equal(found, features(number, 1 + number % 4, dtype))
    assert store.missing(keys_of(range(48, 53))).tolist() == [False, False, True, True, True]
    with pytest.raises(KeyError, match="no features with key"):
        store.get(key(50))
    assert store.damaged(store.files) == []


def test_another_process_finds_them_and_nobody_sees_half_a_shard(tmp_path: Path) -> None:
    store, other = (FeatureStore(tmp_path, SPACE, WIDTH, torch.float32) for _ in range(2))
    writer = ShardWriter(store)
    writer.add(key(0), features(0, 3))
    other.refresh()
    assert other.missing(keys_of(range(1))).all()
    writer.flush()
    (store.place / ".0123.partial").write_bytes(b"half")
    assert other.refresh() == []
    again = pickle.loads(pickle.dumps(other))
    assert torch.equal(again.get(key(0)), features(0, 3))


def test_features_of_another_tower_dtype_or_setting_lie_elsewhere(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    others = [
        FeatureStore(tmp_path, {"tower": "b"}, WIDTH, torch.float32),
        FeatureStore(tmp_path, SPACE, WIDTH, torch.bfloat16),
        FeatureStore(tmp_path, SPACE | {"size": 3}, WIDTH, torch.float32),
        FeatureStore(tmp_path, SPACE, WIDTH * 2, torch.float32),
    ]
    assert len({store.place, *(other.place for other in others)}) == 5
    assert FeatureStore(tmp_path, dict(SPACE), WIDTH, torch.float32).place == store.place
    # A shard that somebody copied there is named, and none of it is used.
    fill(others[0], range(3))
    store.place.mkdir()
    (shard,) = others[0].place.glob("*.arrow")
    copied = store.place / shard.name
    copied.write_bytes(shard.read_bytes())
    assert store.refresh() == [copied]
    assert store.missing(keys_of(range(3))).all()


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_shard_is_named_and_not_used(keep: float, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(4))
    fill(store, range(4, 8))
    one = sorted(store.place.glob("*.arrow"))[0]
    content = one.read_bytes()
    one.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert store.refresh() == [one]
    assert store.missing(keys_of(range(8))).sum() == 4


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(4))
    fill(store, range(4, 8))
    store.refresh()
    (file,) = store.unverified(keys_of(range(6, 7)))
    content = bytearray(file.read_bytes())
    at = content.index(features(6, 3).numpy().tobytes())
    content[at + 5] ^= 1
    file.write_bytes(content)
    assert store.refresh() == []
    assert store.damaged(store.unverified(keys_of(range(4)))) == []
    assert store.damaged(store.unverified(keys_of(range(8)))) == [file]


def test_a_verified_shard_is_not_read_again_at_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(4))
    fill(store, range(4, 8))
    store.refresh()
    assert store.unverified(keys_of(range(8))) == store.files
    assert store.damaged(store.unverified(keys_of(range(4)))) == []
    assert len(store.unverified(keys_of(range(8)))) == 1
    assert store.damaged(store.files) == []
    other = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    other.refresh()
    monkeypatch.setattr(FeatureStore, "_read", None)
    assert other.unverified(keys_of(range(8))) == []
    assert other.damaged([]) == []
    # Its note goes with its size and time.
    file = other.files[0]
    file.write_bytes(file.read_bytes())
    assert other.unverified(keys_of(range(8))) == [file]


def test_what_rots_later_is_a_sentence_and_the_next_start_reads_the_shard_again(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(4))
    store.refresh()
    assert store.damaged(store.files) == []
    (file,) = store.files
    stamp = file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[content.index(features(2, 3).numpy().tobytes()) + 7] ^= 16
    file.write_bytes(content)
    os.utime(file, ns=(stamp, stamp))
    # As the disk rots: nothing tells it but the content.
    assert store.unverified(keys_of(range(4))) == []
    assert torch.equal(store.get(key(1)), features(1, 2))
    with pytest.raises(UserError, match=rf"^{file}: kept features are damaged; start again, which makes them anew"):
        store.get(key(2))
    assert store.unverified(keys_of(range(4))) == [file]
    assert store.damaged([file]) == [file]
    # A shard cut short under an open run.
    os.truncate(file, 10)
    with pytest.raises(UserError, match="kept features are damaged"):
        store.get(key(1))


def test_keys_are_found_one_by_one_as_all_at_once(tmp_path: Path) -> None:
    # Bytes of zero at the end, and keys that differ in the last bit alone.
    keys = [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**64 - 1), (2**64 - 1, 2**64 - 2), (256, 0), (1, 256)]
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    writer = ShardWriter(store)
    for number, one in enumerate(keys):
        writer.add(one, features(number, 1))
    writer.flush()
    store.refresh()
    assert [torch.equal(store.get(one), features(number, 1)) for number, one in enumerate(keys)] == [True] * len(keys)
    strangers = [(0, 2), (2, 0), (255, 0), (1, 255), (2**64 - 2, 2**64 - 1)]
    assert store.missing(np.array([*keys, *strangers], dtype=np.uint64)).tolist() == [False] * 7 + [True] * 5


def test_a_key_is_the_files_content(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    assert image_key(tmp_path / "a") == image_key(tmp_path / "b") != image_key(tmp_path / "c")


def table() -> ImageKeys:
    return image_keys([[(key(0), 1), (key(1), 2)], [], [(key(1), 2)], [(key(2), 3)]])


def test_a_records_features_stand_in_the_order_of_its_images(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(3))
    store.refresh()
    kept = KeptFeatures(table(), store)
    assert torch.equal(kept.of(0), torch.cat([features(0, 1), features(1, 2)]))
    assert kept.of(1).shape == (0, WIDTH)
    assert torch.equal(kept.of(3), features(2, 3))


def test_each_image_is_needed_once(tmp_path: Path) -> None:
    kept = KeptFeatures(table(), FeatureStore(tmp_path, SPACE, WIDTH, torch.bfloat16))
    assert kept.needs(range(4)).tolist() == [0, 1, 3]
    assert kept.needs([2, 0]).tolist() == [2, 0]
    assert kept.needs([1]).tolist() == []
    assert kept.bytes_of([0, 3]) == (1 + 3) * WIDTH * 2


def test_an_image_that_changes_after_it_was_measured_is_a_fault(
    encoder_for: Callable[..., Encoder], tmp_path: Path
) -> None:
    image = tmp_path / "map.png"
    Image.new("RGB", (84, 84)).save(image)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text_input": "<image>?", "image_input": "map.png", "text_output": "A"}) + "\n")
    encoder = encoder_for("sft", 4, rows)
    index = build_index(rows, encoder, 4096, 0.0, ("image_input",))
    images = _Images(index.rows, encoder, "image_input", index.images["image_input"], np.array([0]))
    assert len(images[0]) == 3
    Image.new("RGB", (84, 140)).save(image)
    place, fault = images[0]
    assert (place, fault.line, fault.field) == (0, 1, "image_input")
    assert fault.what == "image map.png has another size than when it was measured"
    # As large as before, but another picture: its features must not be kept under the old one's key.
    Image.new("RGB", (84, 84), "red").save(image)
    place, fault = images[0]
    assert (place, fault.line, fault.what) == (0, 1, "image map.png is another one than when it was measured")
