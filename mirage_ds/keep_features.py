"""Before the first step: the frozen tower encodes every image that is not kept yet, all ranks together.

P patches, F merged features of an image, H hidden width of the language model, W ranks.

Features are a function of the image file, the image settings and the tower's weights (data/features.py). Once they are
kept, neither this run nor the next stage, epoch or ablation decodes those images or calls the tower again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import FeatureStore, ImageKeys, KeptFeatures, ShardWriter
from mirage_ds.data.loader import faults_error
from mirage_ds.data.record import Fault, RecordError, record_of
from mirage_ds.engine.setup import World, agree, everyone, from_rank_zero
from mirage_ds.errors import UserError
from mirage_ds.model.vision import FrozenTower
from mirage_ds.startup import quiet
from mirage_ds.stop import Stopped, ignore_in_worker, never

if TYPE_CHECKING:
    from datasets import Dataset

# Settings of the image processor that decide what the tower sees.
SETTINGS = (
    *("size", "patch_size", "temporal_patch_size", "merge_size", "resample", "rescale_factor"),
    *("image_mean", "image_std", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb"),
)
# Directory listings of a network file system may be a minute old.
LISTING_DELAY_S = 90

# Images that travel together from a worker: each tensor sent costs about as much as encoding a small image.
CHUNK = 32

Decoded = tuple[list[int], torch.Tensor, torch.Tensor]
# Place in the table of images, and what is wrong with the image there.
Broken = tuple[int, Fault]


class _Images(torch.utils.data.Dataset):
    """Decodes the images of one field: (place in the table, pixels (P, 1176), grid (1, 3)), or (place, Fault)."""

    def __init__(self, records: Dataset, encoder: Encoder, name: str, images: ImageKeys, places: Sequence[int]):
        self.records, self.encoder, self.name, self.images, self.places = records, encoder, name, images, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor, torch.Tensor] | Broken:
        place = self.places[number]
        row = self.images.row_of(place)
        record = record_of(self.records[row])
        path = getattr(record, self.name)[place - int(self.images.starts[row])]
        try:
            pixels, grid = self.encoder.pixels(record, self.name, path)
        except RecordError as error:
            return place, error.fault
        if int(grid.prod()) // self.encoder.images.merge_size**2 != int(self.images.sizes[place]):
            what = f"image {path} has another size than a minute ago, when it was measured"
            return place, Fault(record.line, self.name, what, "leave the images alone while a run starts")
        return place, pixels, grid


def _join(items: list[tuple[int, torch.Tensor, torch.Tensor] | Broken]) -> tuple[Decoded | None, list[Broken]]:
    """Put the decoded images of a chunk into two tensors, and the faults beside them."""
    good = [item for item in items if len(item) == 3]
    faults = [item for item in items if len(item) == 2]
    if not good:
        return None, faults
    places, pixels, grids = zip(*good, strict=True)
    return (list(places), torch.cat(pixels), torch.cat(grids)), faults


def _store(folder: Path, tower: FrozenTower, encoder: Encoder, name: str, world: World) -> FeatureStore:
    processor: Any = encoder.images if name == "image_input" else encoder.helpers
    settings = {key: getattr(processor, key) for key in SETTINGS}
    settings["size"] = {key: int(settings["size"][key]) for key in ("shortest_edge", "longest_edge")}
    space = {"tower": from_rank_zero(tower.fingerprint, world), "processor": {k: str(v) for k, v in settings.items()}}
    return FeatureStore(folder, space, tower.width, tower.tower.dtype)


def _missing(kept: KeptFeatures, needed: list[int], world: World) -> list[int]:
    """Return the places whose features are not kept, or not whole; unusable shards are removed. All ranks call it."""
    store, keys = kept.store, kept.images.keys

    def remove(files: list[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)

    from_rank_zero(lambda: remove(store.refresh()), world)
    store.refresh()
    absent = from_rank_zero(lambda: store.missing(keys[needed]), world)
    present = [place for place, gone in zip(needed, absent, strict=True) if not gone]
    # Each rank reads its share: what was written years ago may have rotted.
    damaged = everyone(store.damaged(keys[present[world.rank :: world.size]]), world)
    if damaged:
        from_rank_zero(lambda: remove(sorted(set(damaged))), world)
        store.refresh()
        absent = from_rank_zero(lambda: store.missing(keys[needed]), world)
    return [place for place, gone in zip(needed, absent, strict=True) if gone]


def _check_room(kept: KeptFeatures, places: list[int], folder: Path) -> None:
    """Refuse to begin what the disk cannot hold."""
    wanted = kept.bytes_of(places)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"--feature_dir {folder}: cannot be written ({error.strerror}); name another folder") from None
    if wanted > free:
        raise UserError(
            f"--feature_dir {folder}: the features of {len(places)} images take {wanted / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; name another folder, or --feature_cache targets or off"
        )


def _make(
    tower: FrozenTower,
    kept: KeptFeatures,
    images: _Images,
    title: str,
    workers: int,
    world: World,
    asked: Callable[[], bool],
    begin: Callable[[str], None],
) -> list[Broken]:
    """Encode this rank's images, or those before somebody asks to stop; return the broken ones."""
    loader = torch.utils.data.DataLoader(
        images, batch_size=CHUNK, collate_fn=_join, num_workers=workers, worker_init_fn=ignore_in_worker
    )
    writer = ShardWriter(kept.store)
    broken: list[Broken] = []
    for decoded, others in track(loader, title, disable=world.rank > 0, transient=True):
        broken += others
        # A sign of progress: encoding may take hours.
        begin("features")
        if decoded is None:
            continue
        places, pixels, grids = decoded
        features = tower.features(pixels.to(world.device), grids.to(world.device))
        sizes = [int(kept.images.sizes[place]) for place in places]
        for place, one in zip(places, features.split(sizes), strict=True):
            writer.add(kept.images.keys[place], one)
        if asked():
            break
    writer.flush()
    return broken


def _rows_with(kept: KeptFeatures, broken: list[Broken], rows: Sequence[int], records: Dataset) -> dict[int, Fault]:
    """Find the rows that have a broken image: also those whose image is another file with the same content."""
    faults = {tuple(kept.images.keys[place].tolist()): fault for place, fault in broken}
    found = {}
    for place in kept.images.of(rows):
        fault = faults.get(tuple(kept.images.keys[place].tolist()))
        row = kept.images.row_of(place)
        if fault and row not in found:
            line = int(records[row]["line"])
            same = line == fault.line
            found[row] = fault if same else replace(fault, line=line, what=f"as on line {fault.line}: {fault.what}")
    return found


def _await(kept: KeptFeatures, needed: list[int], world: World) -> None:
    """Wait until this rank sees what the others have written.

    Raises:
        UserError: on every rank, where one of them cannot see it.
    """
    deadline = time.monotonic() + LISTING_DELAY_S
    while True:
        kept.store.refresh()
        unseen = int(kept.store.missing(kept.images.keys[needed]).sum())
        if not unseen or time.monotonic() > deadline:
            break
        time.sleep(1)
    blind = everyone([(world.rank, unseen)] if unseen else [], world)
    if blind:
        rank, count = blind[0]
        raise UserError(
            f"--feature_dir {kept.store.place.parent}: rank {rank} does not see the features of {count} images that "
            "other ranks have written there; name a folder that all hosts share"
        )


def keep_features(
    tower: FrozenTower,
    encoder: Encoder,
    records: Dataset,
    images: Mapping[str, ImageKeys],
    rows: Sequence[int],
    data_path: Path,
    folder: Path,
    workers: int,
    world: World,
    skip: bool = False,
    asked: Callable[[], bool] = never,
    begin: Callable[[str], None] = quiet,
) -> tuple[dict[str, KeptFeatures], dict[int, Fault]]:
    """Make and keep those features of the rows' images that are not kept yet. All ranks call it.

    Args:
        records: the records file, opened; images: field name → its images, for the fields to be kept.
        rows: the dataset rows whose images are needed.
        folder: holds all kept features; every rank must see it.
        workers: processes a rank that decode images.
        skip: go on without the rows that have a broken image.
        asked: whether somebody wants this process to stop.
        begin: is told again and again that this phase goes on.

    Returns:
        Field name → its features; with `skip`, dataset row → its fault, the same on every rank.

    Raises:
        UserError: on every rank: a broken image, too little room, a folder that not all hosts share.
        Stopped: on every rank; what has been made is kept.
    """
    made: dict[str, KeptFeatures] = {}
    faults: dict[int, Fault] = {}
    for name, keys in images.items():
        kept = KeptFeatures(keys, _store(folder, tower, encoder, name, world))
        needed = kept.needs(rows)
        missing = _missing(kept, needed, world)
        if missing:
            from_rank_zero(partial(_check_room, kept, missing, folder), world)
            own = _Images(records, encoder, name, keys, missing[world.rank :: world.size])
            title = "encoding input images" if name == "image_input" else "encoding helper images"
            try:
                own_broken = _make(tower, kept, own, title, workers, world, asked, begin)
            except OSError as error:
                how = "make room or name another folder, or --feature_cache off"
                raise UserError(f"--feature_dir {folder}: {error.strerror}; {how}", everywhere=False) from None
            broken = everyone(own_broken, world)
            if broken and not skip:
                raise faults_error(data_path, [fault for _, fault in broken])
            if agree(asked(), world):
                raise Stopped
            faults = _rows_with(kept, broken, rows, records) | faults
            gone = {place for place, _ in broken}
            needed = [place for place in needed if place not in gone]
        _await(kept, needed, world)
        made[name] = kept
    return made, faults
