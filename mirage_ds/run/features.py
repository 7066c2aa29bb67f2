"""Before the first step: the frozen tower encodes every image that is not kept yet, all ranks together.

P patches, F merged features of an image, H hidden width of the language model, k latents a block, W ranks.

Features are a function of the image file, the image settings and the tower's weights (data/features.py). Once they are
kept, neither this run nor the next stage, epoch or ablation decodes those images or calls the tower again. Of a helper
image only its k targets are kept.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mirage_ds.config.mixture import Records
from mirage_ds.data.encode import Encoder, beside_each
from mirage_ds.data.features import FeatureStore, KeptFeatures, ShardWriter, sortable
from mirage_ds.data.images import READING
from mirage_ds.data.index import Index
from mirage_ds.data.load import settings_of
from mirage_ds.data.pack import neighbours
from mirage_ds.data.pooling import DROPPED
from mirage_ds.data.progress import track
from mirage_ds.data.record import Fault, RecordError
from mirage_ds.data.record_files import faults_error
from mirage_ds.data.sample import ImageKeys
from mirage_ds.data.selection import Selection, by_place
from mirage_ds.data.ship import Shipment, from_workers, ship
from mirage_ds.engine.setup import World, everyone, from_rank_zero
from mirage_ds.errors import Stopped, UserError, reason
from mirage_ds.model.images import embedded
from mirage_ds.model.latents import averages
from mirage_ds.model.targets import Targets
from mirage_ds.model.vision import FrozenTower

if TYPE_CHECKING:
    from mirage_ds.run.settings import Run

# Directory listings of a network file system may be a minute old.
LISTING_DELAY_S = 90

# Images that travel together from a worker: each tensor sent costs about as much as encoding a small image.
CHUNK = 32
# Their pixels, unless one image alone has more.
CHUNK_BYTES = 32 << 20
# Chunks that are ready, or being made, in each worker.
PREFETCHED = 2
# Pixels of one rank that lie in its workers and in shared memory; of large images fewer workers decode at a time.
IN_FLIGHT_BYTES = 1 << 30


class Images:
    """Decodes images of one field.

    Args:
        images: all images of the field, with the sizes that they were measured with; each is known by its place there.
        tower: what encodes them; pixels arrive in its dtype.
        targets: what makes helpers' targets, where they are learned.
    """

    def __init__(
        self,
        index: Index,
        encoder: Encoder,
        name: str,
        images: ImageKeys,
        tower: FrozenTower,
        targets: Targets | None = None,
    ):
        self.index, self.encoder, self.name, self.images = index, encoder, name, images
        self.dtype, self.width, self.targets = tower.tower.dtype, tower.input_width, targets
        self.encoders = beside_each(encoder, index.files, index.pictures)
        self.merged = encoder.images.merge_size**2

    def bytes_of_pixels(self, places: np.ndarray) -> list[int]:
        """Bytes of the pixels of each image at these places."""
        patches = np.asarray(self.images.sizes[places], dtype=np.int64) * self.merged
        return (patches * self.encoder.patch_width * self.dtype.itemsize).tolist()

    def kept_of(self, features: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Return what is kept of one image's features (F, W): these, of stage1's helper targets (k, H)."""
        if self.name == "image_input" or not self.encoder.pools:
            return features
        if self.targets is not None:
            return self.targets.of(features, torch.tensor(grid))
        groups = torch.from_numpy(self.encoder.groups_of((grid[0], grid[1], grid[2]))).to(features.device)
        source = (groups != DROPPED).nonzero()[:, 0]
        # As the forward does it with features that are not kept, to the bit where index_add keeps an order.
        return averages(embedded(features, self.width), source, groups[source], torch.bincount(groups[source]))

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor] | Fault:
        """Return an image's pixels (P, 1176) and grid (1, 3), or its Fault."""
        row = int(self.images.rows_of(np.array(place)))
        record = self.index.record(row)
        path = getattr(record, self.name)[place - int(self.images.starts[row])]
        encoder = self.encoders[int(self.index["file"][row])]
        try:
            pixels, grid = encoder.pixels(record, self.name, [path])
            # Features under the key of another content would be wrong for every run to come.
            if encoder.finder.key(record, self.name, path) != tuple(self.images.keys[place].tolist()):
                what = f"image {path} is another one than when it was measured"
                raise record.fault(self.name, what, "start the run again")
        except RecordError as error:
            return self.index.named(error.fault, row)
        return pixels.to(self.dtype), grid

    def chunk(self, places: Sequence[int]) -> Shipment:
        """Return several images, to be sent: (place, pixels and grid, or the Fault) of each."""
        return ship(tuple((place, self[place]) for place in places))


def _kept(
    folder: Path,
    tower: FrozenTower,
    fingerprint: str,
    encoder: Encoder,
    name: str,
    images: ImageKeys,
    targets: Targets | None = None,
) -> KeptFeatures:
    """Say what is kept of a field's images: features, of stage1's helpers targets."""
    processor = settings_of(encoder.images if name == "image_input" else encoder.helpers)
    space: dict[str, Any] = {"tower": fingerprint, "processor": processor, "reading": READING}
    width = tower.width
    if name == "image_output" and encoder.pools:
        learned = targets and targets.digest
        space["targets"] = ["learned", learned] if learned else [encoder.latent_size, encoder.compress]
        width = tower.input_width
        images = images._replace(sizes=np.full(len(images.sizes), encoder.latent_size))
    return KeptFeatures(images, FeatureStore(folder, space, width, tower.tower.dtype))


def _open(kept: KeptFeatures, names: Sequence[str], world: World) -> None:
    """Open shards, each on one rank, and learn where the others found what. All ranks call it.

    Raises:
        UserError: on every rank, where one of them cannot see a shard.
    """
    deadline = time.monotonic() + LISTING_DELAY_S
    while (unseen := len(set(names) - set(kept.store.listed()))) and time.monotonic() < deadline:
        time.sleep(1)
    blind = everyone([(world.rank, unseen)] if unseen else [], world)
    if blind:
        rank, count = blind[0]
        raise UserError(
            f"--feature_dir {kept.store.place.parent}: rank {rank} does not see {count} files of features that were "
            "written there; name a folder that all hosts share, and delete nothing in it"
        )
    kept.store.add(everyone(kept.store.opened(names[world.rank :: world.size]), world))


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Turn what the folder of features leads to on this rank into a sentence."""
    try:
        yield
    except OSError as error:
        how = "make room or name another folder, or --feature_cache off"
        raise UserError(f"--feature_dir {folder}: {error.strerror or reason(error)}; {how}", everywhere=False) from None


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
    run: Run, tower: FrozenTower, kept: KeptFeatures, images: Images, places: np.ndarray
) -> tuple[list[str], list[tuple[int, Fault]]]:
    """Encode this rank's images, which are at these places, or those before somebody asks to stop.

    Returns:
        The names of the shards, and the broken images: place and fault.
    """
    sizes = images.bytes_of_pixels(places)
    ends = list(neighbours(sizes, CHUNK_BYTES, CHUNK))
    chunks = [places[first:end].tolist() for first, end in ends]
    largest = max((sum(sizes[first:end]) for first, end in ends), default=1)
    workers = min(run.config.num_workers, max(1, IN_FLIGHT_BYTES // (PREFETCHED * largest)))
    writer = ShardWriter(kept.store)
    broken: list[tuple[int, Fault]] = []
    title = "encoding input images" if images.name == "image_input" else "encoding helper images"
    made = from_workers(images.chunk, chunks, workers, PREFETCHED)
    for chunk in track(made, title, total=len(chunks), quiet=run.world.rank > 0):
        # A sign of progress: encoding may take hours.
        run.journal.phase("features")
        found = dict(chunk.unpack())
        broken += [(place, image) for place, image in found.items() if isinstance(image, Fault)]
        whole = {place: image for place, image in found.items() if not isinstance(image, Fault)}
        if whole:
            pixels, grids = map(torch.cat, zip(*whole.values(), strict=True))
            features = tower.features(pixels, grids).split((grids.prod(-1) // images.merged).tolist())
            for place, grid, own in zip(whole, grids.tolist(), features, strict=True):
                writer.add(kept.images.keys[place], images.kept_of(own, grid))
        if run.asked():
            break
    writer.flush()
    return writer.written, broken


def _rows_with(kept: KeptFeatures, broken: list[tuple[int, Fault]], rows: np.ndarray) -> dict[int, Fault]:
    """Find the rows that have a broken image: also those whose image is another file with the same content."""
    keys, faults = sortable(kept.images.keys), dict[bytes, Fault]()
    for place, fault in sorted(broken, key=lambda one: by_place(one[1])):
        faults.setdefault(keys[place], fault)
    places = kept.images.of(rows)
    hit = places[np.isin(keys[places], list(faults))]
    found: dict[int, Fault] = {}
    for row, place in zip(kept.images.rows_of(hit).tolist(), hit.tolist(), strict=True):
        # Of a row's broken images the first.
        found.setdefault(row, faults[keys[place]])
    return found


def keep_features(
    run: Run,
    tower: FrozenTower,
    encoder: Encoder,
    selection: Selection,
    rows: np.ndarray,
    data_path: Records,
    targets: Targets | None = None,
) -> tuple[dict[str, KeptFeatures], dict[int, Fault]]:
    """Make and keep those features of the rows' images that are not kept yet. All ranks call it.

    Args:
        selection: its index has the images whose features are kept.
        rows: the rows whose images are needed, (n,).
        targets: what makes helpers' targets, where they are learned.

    Returns:
        Field name → its features; with --skip_bad_records, each row that has a broken image → the fault, the same on
        every rank.

    Raises:
        UserError: on every rank: a broken image, too little room, a folder that not all hosts share.
        Stopped: on every rank; what has been made is kept.
    """
    world, folder = run.world, run.config.features_folder
    made: dict[str, KeptFeatures] = {}
    lost: dict[int, Fault] = {}
    fingerprint = from_rank_zero(tower.fingerprint, world) if selection.rows.images else ""
    for name, keys in selection.rows.images.items():
        kept = _kept(folder, tower, fingerprint, encoder, name, keys, targets)
        with _said(folder):
            _open(kept, from_rank_zero(kept.store.listed, world), world)
        needed = kept.needs(rows)
        missing = needed[kept.store.missing(keys.keys[needed])]
        if len(missing):
            from_rank_zero(partial(_check_room, kept, missing, folder), world)
            used = targets.tower if targets is not None and name == "image_output" else tower
            images = Images(selection.rows, encoder, name, keys, used, targets)
            with _said(folder):
                written, own_broken = _make(run, used, kept, images, missing[world.rank :: world.size])
            broken = everyone(own_broken, world)
            if broken and not run.config.skip_bad_records:
                faults = sorted((fault for _, fault in broken), key=by_place)
                raise faults_error(data_path, faults, len(faults), len(selection.rows))
            if run.stops():
                raise Stopped
            if broken:
                lost = _rows_with(kept, broken, rows) | lost
            names = everyone(written, world)
            with _said(folder):
                _open(kept, names, world)
            # Spoilt or gone between two looks: without this the first step that needs it would fail.
            if lacking := sorted(set(names) - set(kept.store.names)):
                raise UserError(
                    f"--feature_dir {kept.store.place}: {lacking[0]}, which was just written, is gone or damaged; "
                    "start again, which makes it anew, and look at the disk and at what deletes files there"
                )
        made[name] = kept
    return made, lost
