"""Making the index of a records source (index.py): processes of all ranks make its parts (index_part.py), one of them
joins these."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.progress import track

from mirage_ds.config.mixture import Records
from mirage_ds.config.run import cache_folder
from mirage_ds.data import sources
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import ImageFinder, changed
from mirage_ds.data.index import (
    BATCH_ROWS,
    COLUMNS,
    DOUBTS,
    FORMAT,
    HEADER,
    PICTURE_BATCH,
    PICTURE_SCHEMA,
    ROW_FILES,
    Index,
    digest_of,
    hash_of,
    open_made,
    put,
    remove_abandoned,
    seen_in,
)
from mirage_ds.data.index_part import Part, Parts, Plan
from mirage_ds.data.inside import folder_of_pictures, writable
from mirage_ds.data.load import fingerprint
from mirage_ds.data.ship import as_it_is, ignore_in_worker
from mirage_ds.errors import UserError
from mirage_ds.files import sync

MOST_PROCESSES = 16
# A network file system answers many questions at once.
LOOKING_THREADS = 16
# Modules that decide what a row is.
CODE = "encode images index index_part inside literals make_index messages pooling record record_files sample sources"


class Writer:
    """Writes parts, one behind the other, into the files of an index.

    Attributes:
        records: how many of them there are so far, whether or not they have the format.
    """

    def __init__(self, folder: Path, keep: Sequence[str]):
        self.folder, self.keep = folder, keep
        schemas = Part.schemas(keep)
        self.records = 0
        self.faults: list[str] = []
        self.pictures = [schemas["pictures"].empty_table()]
        # A number of each row takes little; written at the end, each column is one array.
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self.images = dict.fromkeys(keep, 0)
        for name in keep:
            self.columns |= {f"{name}.keys": [], f"{name}.sizes": [], f"{name}.starts": [np.zeros(1, np.int64)]}
        self.files = ExitStack()
        self.tables = {}
        for name, schema in ROW_FILES.items():
            # Python's file: its errors have a number.
            file = self.files.enter_context((folder / name).open("wb"))
            self.tables[name] = self.files.enter_context(pa.ipc.new_file(file, schema))
        self.waiting = schemas["rows"].empty_table()

    def add(self, part: Part) -> None:
        """Append a part."""
        # Copies: a view of a part would keep all of it, with its texts, until the end.
        for name in COLUMNS:
            self.columns[name].append(part.rows[name].to_numpy().copy())
        for name in self.keep:
            keys, sizes = (part.rows[f"{name}.{one}"].combine_chunks() for one in ("keys", "sizes"))
            self.columns[f"{name}.keys"].append(keys.flatten().to_numpy().reshape(-1, 2).copy())
            self.columns[f"{name}.sizes"].append(sizes.flatten().to_numpy().copy())
            counts = sizes.value_lengths().to_numpy(zero_copy_only=False)
            self.columns[f"{name}.starts"].append(self.images[name] + np.cumsum(counts))
            self.images[name] += int(counts.sum())
        self.waiting = pa.concat_tables([self.waiting, part.rows])
        self._write(len(self.waiting) // BATCH_ROWS * BATCH_ROWS)
        self.faults += part.faults["fault"].to_pylist()
        self.pictures.append(part.pictures.take(pa.array(np.arange(len(part.pictures)))))
        self.records += part.records

    def _write(self, count: int) -> None:
        ready = self.waiting.slice(0, count).combine_chunks()
        for name, schema in ROW_FILES.items():
            for batch in ready.select(schema.names).to_batches(BATCH_ROWS):
                self.tables[name].write_batch(batch)
        self.waiting = self.waiting.slice(count)

    def finish(self, finder: ImageFinder, source: str, pictures: Path) -> None:
        """Write what is left, and the header.

        Args:
            source: hash of the records.
            pictures: where pictures that came inside records files lie.
        """
        self._write(len(self.waiting))
        self.files.close()
        (self.folder / "faults.jsonl").write_text("".join(f"{line}\n" for line in self.faults), encoding="utf-8")
        for name, parts in self.columns.items():
            # numpy itself says nothing of a full disk, or not why.
            column = io.BytesIO()
            np.save(column, np.concatenate(parts))
            (self.folder / f"{name}.npy").write_bytes(column.getbuffer())
        seen = pa.concat_tables(self.pictures)
        # Every part names the images that its records show.
        seen = seen.group_by(PICTURE_SCHEMA.names, use_threads=False).aggregate([("faulty", "any")])
        seen = seen.sort_by([(name, "ascending") for name in PICTURE_SCHEMA.names]).combine_chunks()
        for name, own in (("pictures.arrow", seen), ("suspects.arrow", seen.filter(seen["faulty_any"]))):
            with (self.folder / name).open("wb") as file, pa.ipc.new_file(file, PICTURE_SCHEMA) as table:
                table.write_table(own.select(PICTURE_SCHEMA.names), PICTURE_BATCH)
        last, place = len(finder.folders) - 1, seen["place"].to_numpy()
        # The rows themselves are checked one by one, when they are read.
        files = {
            file.name: (file.stat().st_size, None if file.name in ROW_FILES else hash_of(file))
            for file in sorted(self.folder.iterdir())
        }
        header = dict(
            format=FORMAT,
            source=source,
            records=self.records,
            faults=len(self.faults),
            # Where it decides nothing, a run in another folder finds the same rows.
            working_directory=str(finder.folders[last]) if ((place == last) | (place < 0)).any() else None,
            inside=bool(pc.any(pc.starts_with(seen["path"], f"{pictures.resolve()}/")).as_py()),
            files=files,
        )
        (self.folder / HEADER).write_text(json.dumps(header | {"digest": digest_of(header)}))


def processes(work: int, sharers: int = 1) -> int:
    """Choose how many processes encode; none where the work is a single piece.

    Args:
        sharers: ranks that share this host's processors.
    """
    return 0 if work < 2 else max(1, min(work, MOST_PROCESSES, len(os.sched_getaffinity(0)) // sharers))


@dataclass(frozen=True)
class Maker:
    """Makes an index, alone or as one of several ranks, each of which makes its share of the parts.

    Attributes:
        data_path: as the user has given it.
        keep, quiet, check_images: see open_index.
        tick: is called again and again.
    """

    data_path: Records
    encoder: Encoder
    keep: Sequence[str]
    cache: Path
    quiet: bool = True
    check_images: bool = False
    tick: Callable[[], None] = lambda: None

    def plan(self) -> Plan:
        """Find the records and the key of their index.

        Raises:
            UserError: a file is missing or cannot be read, or the cache not written.
        """
        files = sources.find_files(self.data_path)
        # Before they are read.
        stamps = sources.stamps(files)
        hashes = []
        for file in files:
            hashes.append(sources.content_hash(file, self.cache))
            self.tick()
        key = key_of(files, hashes, self.encoder, self.keep)
        return Plan(self.cache / "index" / key, files, stamps, sources.data_hash(hashes), [])

    def open(self, plan: Plan) -> Index | None:
        """Open what is there; where that is damaged or, as far as is looked, of other images, it is removed."""
        there = plan.place.exists()
        index = open_made(plan.place, plan.files, self.cache)
        other = index is not None and self._pictures_changed(index)
        if other:
            shutil.rmtree(plan.parts, ignore_errors=True)
        if other or (there and index is None):
            with writable(self.cache):
                # Without its header it is no index.
                (plan.place / HEADER).unlink(missing_ok=True)
            shutil.rmtree(plan.place, ignore_errors=True)
            return None
        return index

    def _pictures_changed(self, index: Index) -> bool:
        """Tell whether an image that was looked at is another file now, or lies elsewhere; reads no image.

        Unless all are to be checked, only the images of records with a fault are looked at: somebody may have corrected
        them. A run may have met the fault later (DOUBTS).
        """
        if index.header["working_directory"] not in (None, str(self.encoder.finder.folders[-1])):
            return True
        if index.header["inside"] and not index.pictures.is_dir():
            return True

        def other(pictures: pa.Table | pa.RecordBatch) -> bool:
            return changed(seen_in(pictures), self.encoder.finder, index.files, index.pictures)

        doubts = index.place / DOUBTS
        if not self.check_images and doubts.exists():
            paths = pa.array({json.loads(line) for line in doubts.read_text().splitlines()}, pa.string())
            seen = index.seen("pictures.arrow").read_all()
            if other(seen.filter(pc.is_in(seen["path"], paths))):
                return True
        name = "pictures.arrow" if self.check_images else "suspects.arrow"
        with ThreadPoolExecutor(LOOKING_THREADS) as pool:
            numbers = range(index.seen(name).num_record_batches)
            return any(pool.map(lambda number: other(index.seen(name).get_batch(number)), numbers))

    def begin(self, plan: Plan) -> tuple[Plan, str]:
        """Cut the files into pieces, for which they are read.

        Returns:
            With the pieces, the name of a new file in the folder of parts, by which others tell that they share it.
        """
        token = f".{uuid.uuid4().hex}"
        with writable(self.cache):
            plan.parts.mkdir(parents=True, exist_ok=True)
            (plan.parts / token).touch()
        return plan._replace(pieces=list(sources.pieces(plan.files))), token

    def make_parts(
        self,
        plan: Plan,
        share: int = 0,
        shares: int = 1,
        sharers: int = 1,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make the parts of one of several shares, as far as they are not there and nobody asks to stop.

        Raises:
            UserError: a file cannot be read, or the cache not written.
        """
        own = range(share, len(plan.pieces), shares)
        loader: Any = torch.utils.data.DataLoader(
            Parts(plan, self.encoder, self.keep, self.cache),
            batch_size=None,
            sampler=own,
            collate_fn=as_it_is,
            num_workers=processes(len(own), sharers),
            worker_init_fn=ignore_in_worker,
        )
        for error in track(loader, "indexing records", total=len(own), disable=self.quiet, transient=True):
            if error:
                raise error
            self.tick()
            if asked():
                return

    def join(self, plan: Plan) -> Index:
        """Write the index from its parts, put it at its place, and return it opened.

        Raises:
            UserError: the records hold nothing or have changed meanwhile, or there is no room.
        """
        with writable(self.cache):
            made = open_made(plan.place, plan.files, self.cache)
            if made is None:
                made = self._join(plan)
            shutil.rmtree(plan.parts, ignore_errors=True)
            return made

    def _join(self, plan: Plan) -> Index:
        place = plan.place
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(place.parent)
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        partial.mkdir()
        writer = Writer(partial, self.keep)
        try:
            parts = Parts(plan, self.encoder, self.keep, self.cache)
            for number in track(range(len(plan.pieces)), "joining the index", disable=self.quiet, transient=True):
                writer.add(parts.read(number, self.check_images))
                self.tick()
            if not writer.records:
                raise sources.no_record(self.data_path)
            sources.check_unchanged(plan.files, plan.stamps)
            writer.finish(self.encoder.finder, plan.source, folder_of_pictures(self.cache))
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            own = open_made(partial, plan.files, self.cache)
            if own is None:
                raise UserError(
                    f"{self.cache}: cannot be read back as it was written; look at the disk, or use --cache_dir"
                )
            return put(own, place, self.cache)
        finally:
            with suppress(OSError):
                writer.files.close()
            shutil.rmtree(partial, ignore_errors=True)


def key_of(files: Sequence[Path], hashes: Sequence[str], encoder: Encoder, keep: Sequence[str]) -> str:
    """Hash of all that an index is a function of, but for the images."""
    finder = encoder.finder
    code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in CODE.split())
    values = dict(
        format=FORMAT,
        # So that nobody who fixes the encoding trains on rows from before.
        code=hashlib.sha256(code).hexdigest(),
        records=[(str(file.parent.resolve()), content) for file, content in zip(files, hashes, strict=True)],
        encoder=fingerprint(encoder),
        keep=sorted(keep),
        # The first looks beside the records, the last in the working directory, which rarely decides anything.
        folders=[str(folder) for folder in finder.folders[1:-1]],
        confined=finder.within is not None,
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def open_index(
    data_path: Records,
    encoder: Encoder,
    keep: Sequence[str] = (),
    cache_dir: Path | None = None,
    quiet: bool = True,
    check_images: bool = False,
) -> Index:
    """Open the index of a records source; it is made first where there is none, and anew where it does not hold.

    Args:
        encoder: its finder looks for images beside each file, wherever it was made for.
        keep: fields ("image_input", "image_output") whose features are kept: their images get keys here and are decoded
            by whoever makes the features.
        cache_dir: holds the index; ~/.cache/mirage_ds if None.
        quiet: show no progress.
        check_images: look at every image file, not only at those of records with a fault.

    Raises:
        UserError: a file is missing, cannot be read or changes meanwhile, there is no record, or no room.
    """
    maker = Maker(data_path, encoder, keep, cache_folder(cache_dir), quiet, check_images)
    plan = maker.plan()
    index = maker.open(plan)
    if index is None:
        plan, _ = maker.begin(plan)
        maker.make_parts(plan)
        index = maker.join(plan)
    return index
