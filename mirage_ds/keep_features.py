"""Before the first step: the frozen tower encodes every image that is not kept yet, all ranks together.

P patches, F merged features of an image, H hidden width of the language model, W ranks.

Features are a function of the image file, the image settings and the tower's weights (data/features.py). Once they are
kept, neither this run nor the next stage, epoch or ablation decodes those images or calls the tower again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import (
    FeatureStore,
    ImageKeys,
    KeptFeatures,
    ShardWriter,
    image_key,
    note_of,
    sortable,
)
from mirage_ds.data.index import BesideEach, EncodedRows
from mirage_ds.data.loader import Broken, by_place, faults_error
from mirage_ds.data.record import Fault, RecordError
from mirage_ds.engine.setup import World, agree, everyone, from_rank_zero
from mirage_ds.errors import UserError
from mirage_ds.mixture import Records
from mirage_ds.model.vision import FrozenTower
from mirage_ds.startup import quiet
from mirage_ds.stop import Stopped, ignore_in_worker, never

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
BrokenImage = tuple[int, Fault]


class _Images(torch.utils.data.Dataset):
    """Decodes the images of one field: (place in the table, pixels (P, 1176), grid (1, 3)), or (place, Fault)."""

    def __init__(self, records: EncodedRows, encoder: Encoder, name: str, images: ImageKeys, places: np.ndarray):
        self.records, self.name, self.images, self.places = records, name, images, places
        self.encoders = BesideEach(encoder, records)
        self.merged = encoder.images.merge_size**2

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor, torch.Tensor] | BrokenImage:
        place = int(self.places[number])
        row = int(self.images.rows_of(np.array(place)))
        record, _ = self.records.encoded(row)
        path = getattr(record, self.name)[place - int(self.images.starts[row])]
        encoder = self.encoders[row]
        how = "start the run again"
        try:
            pixels, grid = encoder.pixels(record, self.name, path)
            if int(grid.prod()) // self.merged != int(self.images.sizes[place]):
                what = f"image {path} has another size than when it was measured"
                raise record.fault(self.name, what, how)
            # Features under the key of another content would be wrong for every run to come.
            if image_key(encoder.finder.find(record, self.name, path)) != tuple(self.images.keys[place].tolist()):
                raise record.fault(self.name, f"image {path} is another one than when it was measured", how)
        except RecordError as error:
            return place, self.records.named(error.fault, row)
        return place, pixels, grid

    def __getitems__(
        self, numbers: Sequence[int]
    ) -> list[tuple[int, torch.Tensor, torch.Tensor] | BrokenImage] | list[UserError]:
        """Return several images; an error that is no record's is the only item."""
        try:
            return [self[number] for number in numbers]
        except UserError as error:
            return [error]


def _join(
    items: list[tuple[int, torch.Tensor, torch.Tensor] | BrokenImage] | list[UserError],
) -> tuple[Decoded | None, list[BrokenImage]] | UserError:
    """Put the decoded images of a chunk into two tensors, and the faults beside them."""
    if isinstance(items[0], UserError):
        return items[0]
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


def _missing(kept: KeptFeatures, needed: np.ndarray, world: World) -> np.ndarray:
    """Return the places whose features are not kept, or not whole; unusable shards are removed. All ranks call it."""
    store, keys = kept.store, kept.images.keys

    def remove(files: list[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)
            note_of(file).unlink(missing_ok=True)

    from_rank_zero(lambda: remove(store.refresh()), world)
    store.refresh()
    absent = from_rank_zero(lambda: store.missing(keys[needed]), world)
    # What nobody has read since it was written may have rotted. Each rank reads its share; what is whole is noted.
    unread = from_rank_zero(lambda: store.unverified(keys[needed[~absent]]), world)
    damaged = everyone(store.damaged(unread[world.rank :: world.size]), world)
    if damaged:
        from_rank_zero(lambda: remove(sorted(set(damaged))), world)
        store.refresh()
        absent = from_rank_zero(lambda: store.missing(keys[needed]), world)
    return needed[absent]


def _check_room(kept: KeptFeatures, places: np.ndarray, folder: Path) -> None:
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
) -> list[BrokenImage]:
    """Encode this rank's images, or those before somebody asks to stop; return the broken ones."""
    loader = torch.utils.data.DataLoader(
        images, batch_size=CHUNK, collate_fn=_join, num_workers=workers, worker_init_fn=ignore_in_worker
    )
    writer = ShardWriter(kept.store)
    broken: list[BrokenImage] = []
    for joined in track(loader, title, disable=world.rank > 0, transient=True):
        if isinstance(joined, UserError):
            raise joined
        decoded, others = joined
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


def _rows_with(kept: KeptFeatures, broken: list[BrokenImage], rows: np.ndarray) -> Broken:
    """Find the rows that have a broken image: also those whose image is another file with the same content."""
    if not broken:
        return Broken.none()
    broken = sorted(broken, key=lambda one: by_place(one[1]))
    keys, number = np.unique(sortable(kept.images.keys[[place for place, _ in broken]]), return_index=True)
    places = kept.images.of(rows)
    own = sortable(kept.images.keys[places])
    at = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
    hit = keys[at] == own
    # Of a row's broken images the first.
    found, first = np.unique(kept.images.rows_of(places[hit]), return_index=True)
    return Broken(found, number[at[hit]][first], tuple(fault for _, fault in broken))


def _await(kept: KeptFeatures, needed: np.ndarray, world: World) -> None:
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
    records: EncodedRows,
    images: Mapping[str, ImageKeys],
    rows: np.ndarray,
    data_path: Records,
    folder: Path,
    workers: int,
    world: World,
    skip: bool = False,
    asked: Callable[[], bool] = never,
    begin: Callable[[str], None] = quiet,
) -> tuple[dict[str, KeptFeatures], Broken]:
    """Make and keep those features of the rows' images that are not kept yet. All ranks call it.

    Args:
        records: the rows on disk; images: field name → its images, for the fields to be kept.
        rows: the dataset rows whose images are needed, (n,).
        folder: holds all kept features; every rank must see it.
        workers: processes a rank that decode images.
        skip: go on without the rows that have a broken image.
        asked: whether somebody wants this process to stop.
        begin: is told again and again that this phase goes on.

    Returns:
        Field name → its features; with `skip`, the rows that have a broken image, the same on every rank.

    Raises:
        UserError: on every rank: a broken image, too little room, a folder that not all hosts share.
        Stopped: on every rank; what has been made is kept.
    """
    made: dict[str, KeptFeatures] = {}
    lost = Broken.none()
    for name, keys in images.items():
        kept = KeptFeatures(keys, _store(folder, tower, encoder, name, world))
        needed = kept.needs(rows)
        missing = _missing(kept, needed, world)
        if len(missing):
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
                raise faults_error(data_path, min((fault for _, fault in broken), key=by_place), len(broken))
            if agree(asked(), world):
                raise Stopped
            lost = lost.and_also(_rows_with(kept, broken, rows))
            needed = np.setdiff1d(needed, [place for place, _ in broken])
        _await(kept, needed, world)
        made[name] = kept
    return made, lost
