"""Kept features on two ranks: made once together, the same numbers as without, mended when broken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.group import Group
from support.on_disk import TIMES

from mirage_ds import train
from mirage_ds.config.run import RunConfig
from mirage_ds.data.features import FeatureStore, ShardWriter
from mirage_ds.errors import UserError
from mirage_ds.model.vision import FrozenTower
from mirage_ds.run.settings import Run

# 6 rows with helpers, 4 a step: 3 steps reach each of them twice.
SETTINGS: dict[str, Any] = dict(
    stage="stage1", latent_size=2, global_batch_size=4, micro_batch_size=1, max_steps=3, warmup_steps=0,
    learning_rate=3e-3, num_workers=0, report_to=["none"], gradient_checkpointing=False,
)  # fmt: skip


def _train(world: Any, settings: dict[str, Any]) -> tuple[str | None, int, list[str]]:
    """Train; what the user is told, how many images this rank's tower has encoded, and the shards it has opened."""
    calls = []
    opened = []
    encode, open_shard = FrozenTower._call, FeatureStore.open

    def listed(self: FeatureStore, name: str) -> Any:
        opened.append(name)
        return open_shard(self, name)

    FeatureStore.open = listed  # type: ignore[method-assign]

    def counted(self: FrozenTower, pixels: Any, grids: Any) -> Any:
        calls.extend(grids.tolist())
        return encode(self, pixels, grids)

    FrozenTower._call = counted  # type: ignore[method-assign]
    try:
        config = RunConfig(**settings)
        run = Run(config, world)
        data, learner = train.open_run(run)
        train.train(run, data, learner)
        learner.engine.destroy()
    except UserError as error:
        return str(error), len(calls), opened
    finally:
        FrozenTower._call = encode  # type: ignore[method-assign]
        FeatureStore.open = open_shard  # type: ignore[method-assign]
    return None, len(calls), opened


@pytest.fixture
def data(mixed: Path, tmp_path: Path) -> Path:
    """The rows that stage1 can use, with pictures of their own: 3 input images, 6 helpers."""
    shutil.copytree(mixed.parent, tmp_path / "data")
    path = tmp_path / "data/helped.jsonl"
    rows = [line for line in mixed.read_text().splitlines() if "image_output" in json.loads(line)]
    path.write_text("\n".join(rows) + "\n")
    return path


class Trainer:
    def __init__(self, group: Group, base: dict[str, Any], folder: Path):
        self.group, self.base, self.folder, self.count = group, base, folder, 0

    def __call__(self, **settings: Any) -> tuple[list[dict[str, float]], int]:
        """Train anew; the log without clocks and the tower's work, and the images encoded on both ranks."""
        self.count += 1
        out = self.folder / f"run{self.count}"
        told = self.group.run(_train, self.base | dict(save_model_path=out) | settings)
        assert [said for said, *_ in told] == [None, None]
        self.opened = [names for *_, names in told]
        lines = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in (*TIMES, "model_flops")} for line in lines], sum(
            n for _, n, _ in told
        )

    def refused(self, **settings: Any) -> str:
        out = self.folder / "refused"
        told = self.group.run(_train, self.base | dict(save_model_path=out) | settings)
        assert told[0][0] == told[1][0]
        assert not out.exists()
        return str(told[0][0])


@pytest.fixture
def trainer(group: Group, nano: Path, data: Path, tmp_path: Path) -> Trainer:
    folder = tmp_path / "features"
    base = SETTINGS | dict(model=str(nano), data_path=data, cache_dir=tmp_path / "cache", feature_dir=folder)
    return Trainer(group, base, tmp_path)


def test_each_image_is_encoded_once_for_all_runs_and_no_digit_changes(trainer: Trainer) -> None:
    # 12 rows of 1 helper and half an input image each: without the cache every use is encoded.
    plain, calls = trainer(feature_cache="off")
    assert calls == 18
    kept, calls = trainer()
    assert calls == 9
    assert kept == plain
    again, calls = trainer()
    assert (again, calls) == (plain, 0)
    # Each shard on one rank, once.
    shards = sorted(file.name for file in (trainer.folder / "features").rglob("*.safetensors"))
    assert [len(names) for names in trainer.opened] == [2, 2]
    assert sorted(name for names in trainer.opened for name in names) == shards
    targets, calls = trainer(feature_cache="targets", feature_dir=trainer.folder / "others")
    assert (targets, calls) == (plain, 6 + 6)
    # Another stage finds the input images, another pixel limit does not.
    assert trainer(stage="stage2")[1] == 0
    assert trainer(stage="stage2", max_pixels=4000)[1] == 3


def test_only_rows_that_the_run_reaches_are_encoded(trainer: Trainer) -> None:
    log, calls = trainer(max_steps=1)
    assert log[0]["rows"] == 4
    assert 4 <= calls <= 7
    assert calls + trainer()[1] == 9


def test_a_broken_or_lost_shard_is_made_anew(trainer: Trainer) -> None:
    plain, _ = trainer()
    shards = sorted((trainer.folder / "features").rglob("*.safetensors"))
    assert len(shards) == 4  # two fields on two ranks
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    shards[1].unlink()
    again, calls = trainer()
    assert again == plain
    assert 3 <= calls < 9
    assert trainer()[1] == 0


def _spoil(world: Any, settings: dict[str, Any]) -> tuple[str | None, int, list[str]]:
    """Train, as _train does, on a disk that cuts short what rank 1 writes."""
    flush = ShardWriter.flush

    def spoilt(self: ShardWriter) -> None:
        flush(self)
        for name in self.written if world.rank else ():
            os.truncate(self.store.place / name, 100)

    ShardWriter.flush = spoilt  # type: ignore[method-assign]
    try:
        return _train(world, settings)
    finally:
        ShardWriter.flush = flush  # type: ignore[method-assign]


def test_a_shard_that_is_spoilt_as_soon_as_it_is_written_is_said_on_every_rank(trainer: Trainer) -> None:
    told = trainer.group.run(_spoil, trainer.base | dict(save_model_path=trainer.folder / "spoilt"))
    assert [said for said, *_ in told] == [told[0][0]] * 2
    assert "which was just written, is gone or damaged; start again" in str(told[0][0])
    assert trainer()[1] < 9


def test_a_broken_image_is_said_on_every_rank_and_nothing_is_claimed(trainer: Trainer, data: Path) -> None:
    image = data.parent / "out4.png"
    image.write_bytes(image.read_bytes()[:300])
    said = trainer.refused()
    assert said.startswith(f"{data}: line 3, image_output: image {image} cannot be decoded (")
    # What the other images gave is not lost.
    shutil.copy(data.parent / "out2.png", image)
    assert trainer()[1] == 1


def test_a_folder_that_cannot_be_written_is_said(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = trainer.refused(feature_dir=tmp_path / "file" / "features")
    assert said.startswith(f"--feature_dir {tmp_path}/file/features: cannot be written (")
