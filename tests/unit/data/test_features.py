"""Kept features: what comes back is what went in, and what is broken or foreign is never taken for whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import families
from support.indices import selected

from mirage_ds.data import features as feature_store
from mirage_ds.data.batch import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import FeatureStore, KeptFeatures, ShardWriter
from mirage_ds.data.images import READING, ImageFinder, image_key
from mirage_ds.data.load import load_encoder
from mirage_ds.data.pack import neighbours
from mirage_ds.data.pooling import pool_groups
from mirage_ds.data.record import Fault, RecordError
from mirage_ds.data.record_files import scan
from mirage_ds.data.sample import ImageKeys
from mirage_ds.errors import UserError
from mirage_ds.model.latents import compress as compressed
from mirage_ds.model.load import load_tower, read_config
from mirage_ds.run import features as keep_features
from mirage_ds.run.features import CHUNK, CHUNK_BYTES, Images, _kept

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


def look(store: FeatureStore) -> list[str]:
    """Open all shards; the names of those that cannot be used."""
    found = {name: store.open(name) for name in store.listed()}
    store.add([shard for shard in found.values() if shard])
    return [name for name, shard in found.items() if shard is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_image_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    # 13 high words for 50 keys: the low word decides.
    store = FeatureStore(tmp_path, SPACE, WIDTH, dtype)
    fill(store, range(50), shard_bytes=300)
    assert look(store) == []
    assert len(store.names) > 5
    assert not store.missing(keys_of(range(50))).any()
    for number in range(50):
        found = store.get(key(number))
        assert found.dtype == dtype
        assert torch.equal(found, features(number, 1 + number % 4, dtype))
    assert store.missing(keys_of(range(48, 53))).tolist() == [False, False, True, True, True]
    with pytest.raises(KeyError, match="no features with key"):
        store.get(key(50))
    # A shard is what safetensors reads.
    first = {name: one for file in sorted(store.place.glob("*.safetensors")) for name, one in load_file(file).items()}
    assert len(first) == 50
    assert torch.equal(first[f"{key(7)[0]:016x}{7:016x}"], features(7, 4, dtype))


def test_the_table_grows_shard_by_shard(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    for at in range(0, 12, 4):
        writer = ShardWriter(store)
        for number in range(at, at + 4):
            writer.add(key(number), features(number, 1 + number % 4))
        writer.flush()
        store.add(store.opened(writer.written))
        assert store.missing(keys_of(range(12))).tolist() == [False] * (at + 4) + [True] * (8 - at)
    assert all(torch.equal(store.get(key(number)), features(number, 1 + number % 4)) for number in range(12))


def test_another_process_finds_them_and_nobody_sees_half_a_shard(tmp_path: Path) -> None:
    store, other = (FeatureStore(tmp_path, SPACE, WIDTH, torch.float32) for _ in range(2))
    writer = ShardWriter(store)
    writer.add(key(0), features(0, 3))
    assert other.listed() == []
    writer.flush()
    (store.place / ".0123.partial").write_bytes(b"half")
    assert look(other) == []
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
    # A shard that somebody copied there is not used, and goes.
    fill(others[0], range(3))
    store.place.mkdir()
    (shard,) = others[0].listed()
    shutil.copy(others[0].place / shard, store.place)
    assert look(store) == [shard]
    assert store.missing(keys_of(range(3))).all()
    assert store.listed() == []


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1, "huge header", "no header", "other header"])
def test_a_spoilt_shard_is_not_used_and_goes(keep: float | str, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(4))
    fill(store, range(4, 8))
    one = store.place / store.listed()[0]
    content = one.read_bytes()
    if isinstance(keep, str):
        head = {
            "huge header": (1 << 46).to_bytes(8, "little"),
            "no header": bytes(8),
            "other header": (2).to_bytes(8, "little") + b"[]",
        }
        one.write_bytes(head[keep] + content[16:])
    else:
        one.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert look(store) == [one.name]
    assert store.missing(keys_of(range(8))).sum() == 4
    assert not one.exists()


def flip(file: Path, number: int) -> None:
    """Flip a bit of an image's features, as a disk rots."""
    content = bytearray(file.read_bytes())
    content[content.index(features(number, 1 + number % 4).numpy().tobytes()) + 5] ^= 1
    file.write_bytes(content)


def test_what_rots_where_nothing_can_be_deleted_is_a_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))

    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(4))
    flip(store.place / store.listed()[0], 2)
    assert look(store) == []
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="kept features are damaged"):
        store.get(key(2))


def test_what_rots_is_a_sentence_and_the_next_start_makes_it_anew(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(4))
    (name,) = store.listed()
    fill(store, range(4, 8))
    flip(store.place / name, 2)
    assert look(store) == []
    assert torch.equal(store.get(key(1)), features(1, 2))
    with pytest.raises(UserError, match=rf"^{store.place / name}: kept features are damaged; start again, which makes"):
        store.get(key(2))
    again = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    assert look(again) == []
    assert again.missing(keys_of(range(8))).tolist() == [True] * 4 + [False] * 4
    assert again.open(name) is None
    # A shard that is gone, as another process meets it, and one cut short under an open run.
    feature_store._opened.cache_clear()
    with pytest.raises(UserError, match="kept features are damaged"):
        store.get(key(1))
    assert torch.equal(store.get(key(5)), features(5, 2))
    os.truncate(store.place / again.names[0], 10)
    with pytest.raises(UserError, match="kept features are damaged"):
        store.get(key(5))


def test_keys_are_found_one_by_one_as_all_at_once(tmp_path: Path) -> None:
    # Bytes of zero at the end, and keys that differ in the last bit alone.
    keys = [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**64 - 1), (2**64 - 1, 2**64 - 2), (256, 0), (1, 256)]
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    writer = ShardWriter(store)
    for number, one in enumerate(keys):
        writer.add(one, features(number, 1))
    writer.flush()
    look(store)
    assert [torch.equal(store.get(one), features(number, 1)) for number, one in enumerate(keys)] == [True] * len(keys)
    strangers = [(0, 2), (2, 0), (255, 0), (1, 255), (2**64 - 2, 2**64 - 1)]
    assert store.missing(np.array([*keys, *strangers], dtype=np.uint64)).tolist() == [False] * 7 + [True] * 5


def test_a_key_is_the_files_content(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    assert image_key(tmp_path / "a") == image_key(tmp_path / "b") != image_key(tmp_path / "c")


def table() -> ImageKeys:
    """Four records: of images 0 and 1, of none, of 1, of 2."""
    keys = np.array([key(0), key(1), key(1), key(2)], dtype=np.uint64)
    return ImageKeys(keys, sizes=np.array([1, 2, 2, 3]), starts=np.array([0, 2, 2, 3, 4]))


def test_a_records_features_stand_in_the_order_of_its_images(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPACE, WIDTH, torch.float32)
    fill(store, range(3))
    look(store)
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
    encoder_for: Callable[..., Encoder], nano: Path, tmp_path: Path
) -> None:
    image = tmp_path / "map.png"
    Image.new("RGB", (84, 84)).save(image)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text_input": "<image>?", "image_input": "map.png", "text_output": "A"}) + "\n")
    encoder = encoder_for("sft", 4, rows)
    index = selected(rows, encoder, 4096, 0.0, ("image_input",))
    tower = load_tower(nano, read_config(nano), torch.float32, torch.device("cpu"))
    images = Images(index.rows, encoder, "image_input", index.rows.images["image_input"], tower)
    assert not isinstance(images[0], Fault)
    # Another size, or as large as before but another picture: never kept under the old one's key.
    for other in (Image.new("RGB", (84, 140)), Image.new("RGB", (84, 84), "red")):
        other.save(image)
        ((place, fault),) = images.chunk([0]).unpack()
        assert (place, fault.line, fault.field) == (0, 1, "image_input")
        assert fault.what == "image map.png is another one than when it was measured"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of two families: the features of the second are 1 + 2 times as wide as what a latent imitates."""
    folder = tmp_path_factory.mktemp("towers")
    return {name: families.write(name, folder / name) for name in ("nano", "nano-qwen3-vl")}


@pytest.mark.parametrize("model", ["nano", "nano-qwen3-vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compress", ["average", "grid", "random", "first"])
def test_kept_targets_are_those_of_a_helper_that_is_not_kept_to_the_bit(
    compress: Any, dtype: torch.dtype, model: str, towers: dict[str, Path], tmp_path: Path
) -> None:
    for name, size in (("a", (140, 84)), ("b", (112, 56)), ("c", (61, 100))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")
    rows = [
        {"text_input": "q", "text_output": "<output_image>x<output_image>y", "image_output": ["a.png", "b.png"]},
        {"text_input": "q", "text_output": "<output_image>z", "image_output": "c.png"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, k = towers[model], 3
    encoder = load_encoder([str(folder)], ImageFinder.beside(file, None), "stage1", k, compress=compress)
    tower = load_tower(folder, read_config(folder), dtype, torch.device("cpu"))
    width = read_config(folder).text_config.hidden_size
    index = selected(file, encoder, 4096, 0.0, ("image_output",), cache_dir=tmp_path / "cache")
    images = Images(index.rows, encoder, "image_output", index.rows.images["image_output"], tower)
    each = []
    for number in range(3):
        pixels, grid = images[number]
        assert pixels.nbytes == images.bytes_of_pixels(np.arange(3))[number]
        features = tower.features(pixels, grid)
        each.append(images.kept_of(features, grid[0].tolist()))
        # By hand, in float64.
        groups = pool_groups(int(grid[0, 1]) // 2, int(grid[0, 2]) // 2, k, compress)
        slow = [features[torch.from_numpy(groups == slot)][:, :width].double().mean(0) for slot in range(k)]
        rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(each[-1].double(), torch.stack(slow), rtol=rounding, atol=1e-6)
    records, _ = scan(file)
    whole = [encoder.encode(record, row) for row, record in enumerate(records)]
    kept = [
        encoder.fill(encoder.lay_out(record), record, row, None, features)
        for row, (record, features) in enumerate(zip(records, [torch.cat(each[:2]), each[2]], strict=False))
    ]
    assert [sample.helper_features.shape for sample in kept] == [(2 * k, width), (k, width)]
    assert all(not sample.helper_pixel_values.numel() for sample in kept)
    targets = []
    for samples in (whole, kept):
        batch = tower.attach(collate(samples, 1, encoder.dummy(1)))
        targets.append(compressed(batch.helper_features, batch, width))
    assert torch.equal(*targets)
    with pytest.raises(RecordError, match="an image changed its size"):
        encoder.fill(encoder.lay_out(records[1]), records[1], 1, None, torch.cat(each))


def test_what_is_kept_is_of_one_way_of_reading_and_pooling(
    encoder_for: Callable[..., Encoder], nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = load_tower(nano, read_config(nano), torch.float32, torch.device("cpu"))

    def places(**changed: Any) -> list[Path]:
        encoder = replace(encoder_for("stage1", 4), **changed)
        kept = (_kept(tmp_path, tower, "print", encoder, name, table()) for name in ("image_input", "image_output"))
        return [one.store.place for one in kept]

    images, helpers = zip(places(), places(latent_size=2), places(compress="grid"), strict=True)
    assert len(set(images)) == 1
    assert helpers[0] not in images
    assert len(set(helpers)) == 3
    # An encoder of helpers reads all their features: those of any image.
    assert places(stage="scaffold") == [images[0]] * 2
    monkeypatch.setattr(keep_features, "READING", READING + 1)
    assert not {*images, *helpers} & {*places()}


@pytest.mark.parametrize("size", [1, CHUNK_BYTES // 100, CHUNK_BYTES // 3, CHUNK_BYTES, 5 * CHUNK_BYTES])
def test_a_chunk_is_bounded_by_its_bytes(size: int) -> None:
    sizes = [size * (1 + number % 3) // 2 for number in range(100)]
    chunks = [range(*ends) for ends in neighbours(sizes, CHUNK_BYTES, CHUNK)]
    assert [number for chunk in chunks for number in chunk] == list(range(100))
    assert all(len(one) == 1 or sum(sizes[at] for at in one) <= CHUNK_BYTES for one in chunks)
    assert max(map(len, chunks)) <= CHUNK
    # None could have taken the next one's first image.
    for one, following in itertools.pairwise(chunks):
        assert len(one) == CHUNK or sum(sizes[at] for at in one) + sizes[following[0]] > CHUNK_BYTES
    assert not list(neighbours([], CHUNK_BYTES, CHUNK))


def test_a_full_disk_while_features_are_kept_is_a_sentence(tmp_path: Path) -> None:
    """A shard, under a limit on the size of files as a full disk sets one."""
    program = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from mirage_ds.data.features import FeatureStore, ShardWriter\n"
        "from mirage_ds.run.features import _said\n"
        "store = FeatureStore(Path(sys.argv[1]), {}, 1, torch.float32)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "with _said(Path(sys.argv[1])): ShardWriter(store, 1).add((1, 2), torch.ones(1 << 16, 1))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"mirage_ds.errors.UserError: --feature_dir {tmp_path}: ")
    assert "make room" in said
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
