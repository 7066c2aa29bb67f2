"""Making the index of a records source (index.py): processes of all ranks make its parts (index_part.py), one of them
joins these."""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mirage_ds.config.columns import RECOGNISED, Columns
from mirage_ds.config.mixture import Records
from mirage_ds.data import sources
from mirage_ds.data.encode import Encoder
from mirage_ds.data.folders import find_files
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.index import DOUBTS, FORMAT, HEADER, NUMBERS, Index, mark_of, open_made
from mirage_ds.data.index_part import PICTURES, Parts, Plan, changed, part_schema
from mirage_ds.data.inside import folder_of_pictures, writable
from mirage_ds.data.load import fingerprint
from mirage_ds.data.progress import track
from mirage_ds.data.record_files import told
from mirage_ds.data.ship import from_workers
from mirage_ds.errors import UserError
from mirage_ds.files import sync

MOST_PROCESSES = 16
# A network file system answers many questions at once.
LOOKING_THREADS = 16
LOOKED_ROWS = 4096
# What a killed run has left behind is removed by a later one, that no longer takes it for another's work in progress.
ABANDONED_S = 7 * 24 * 3600.0
# Modules that decide what a row is.
CODE = """encode flat folders images index index_part inside kinds layouts literals make_index messages pooling record
record_files region sample sources"""
SHOWN = pa.schema({"file": pa.int32(), "pictures": PICTURES})


def write_index(
    folder: Path, parts: Iterable[pa.Table], keep: Sequence[str], finder: ImageFinder, source: str, pictures: Path
) -> int:
    """Write parts, one behind the other, as the files of an index; return the number of records.

    Args:
        source: hash of the records.
        pictures: where pictures that came inside records files lie.
    """
    # A number of each row takes little; written at the end, each column is one array.
    columns = [part_schema(keep).empty_table().select([*NUMBERS.names, *keep])]
    places: set[int] = set()
    inside = False
    with (folder / "rows.bin").open("wb") as rows, _table(folder / "pictures.arrow", SHOWN) as shown:
        for part in parts:
            rows.writelines(part["content"].to_pylist())
            shown.write_table(part.select(SHOWN.names))
            # A copy: a view of a part would keep all of it, with its texts, until the end.
            columns.append(part.select(columns[0].column_names).take(pa.array(np.arange(len(part)))))
            seen = pc.list_flatten(part["pictures"])
            places.update(pc.unique(pc.struct_field(seen, "place")).to_pylist())
            inside |= bool(pc.any(pc.starts_with(pc.struct_field(seen, "path"), f"{pictures.resolve()}/")).as_py())
    whole = pa.concat_tables(columns).combine_chunks()
    sizes = whole["bytes"].to_numpy()
    whole = whole.append_column("start", pa.array(np.cumsum(sizes) - sizes))
    with _table(folder / "columns.arrow", whole.schema) as written:
        written.write_table(whole)
    last = len(finder.folders) - 1
    header = dict(
        format=FORMAT,
        source=source,
        # Where it decides nothing, a run in another folder finds the same rows.
        working_directory=str(finder.folders[last]) if places & {last, -1} else None,
        inside=inside,
        files={file.name: mark_of(file) for file in sorted(folder.iterdir())},
    )
    (folder / HEADER).write_text(json.dumps(header))
    return len(whole)


@contextmanager
def _table(file: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    # Python's file: its errors have a number.
    with file.open("wb") as content, pa.ipc.new_file(content, schema) as table:
        yield table


def put(own: Index, place: Path, cache: Path) -> Index:
    """Rename a whole index to its place, and return it opened.

    What lies there is damaged or old, or another run has just made the same: then that one stays.
    """
    while True:
        theirs = open_made(place, own.files, cache)
        if theirs is not None and theirs.header == own.header:
            return theirs
        with suppress(FileNotFoundError):
            old = place.replace(place.with_name(f".{place.name}.{uuid.uuid4().hex}"))
            shutil.rmtree(old, ignore_errors=True)
        try:
            own.place.replace(place)
        except OSError as error:
            # Another run was quicker, and may have been moved away since.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        sync(place.parent)
        # Opened before it was in reach of other runs, one of which may be putting another in its place.
        own.place = place
        return own


def remove_abandoned(folder: Path) -> None:
    """Remove what lies under a name of work in progress and has not been touched for long."""
    for left in folder.glob(".*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)


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
        encoder: its finder looks for images beside each file, wherever it was made for.
        keep: fields ("image_input", "image_output") whose features are kept: their images get keys here and are decoded
            by whoever makes the features.
        cache: holds the index.
        quiet: show no progress.
        check_images: look at every image file, not only at those of records with a fault.
        tick: is called again and again.
        columns: the names of the records' own columns.
    """

    data_path: Records
    encoder: Encoder
    keep: Sequence[str]
    cache: Path
    quiet: bool = True
    check_images: bool = False
    tick: Callable[[], None] = lambda: None
    columns: Columns = RECOGNISED

    def index(self) -> Index:
        """Open the index of the records, alone; it is made where there is none, and anew where it does not hold.

        Raises:
            UserError: a file is missing, cannot be read or changes meanwhile, there is no record, or no room.
        """
        plan = self.plan()
        index = self.open(plan)
        if index is None:
            plan, _ = self.begin(plan)
            self.make_parts(plan)
            index = self.join(plan)
        return index

    def plan(self) -> Plan:
        """Find the records and the key of their index.

        Raises:
            UserError: a file is missing or cannot be read, or the cache not written; or a named column is not there.
        """
        files = find_files(self.data_path)
        list(told(self.data_path, self.columns))
        # Before they are read.
        stamps = [sources.Stamp.of(file) for file in files]
        hashes = []
        for file in files:
            hashes.append(sources.content_hash(file, self.cache))
            self.tick()
        place = self.cache / "index" / self._key(files, hashes)
        return Plan(place, files, stamps, sources.data_hash(hashes), [], self.columns)

    def _key(self, files: Sequence[Path], hashes: Sequence[str]) -> str:
        """Hash of all that an index is a function of, but for the images."""
        finder = self.encoder.finder
        code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in CODE.split())
        values = dict(
            format=FORMAT,
            # So that nobody who fixes the encoding trains on rows from before.
            code=hashlib.sha256(code).hexdigest(),
            # A table is known by its name too.
            records=[(str(file.parent.resolve()), file.suffix.lower()) for file in files],
            hashes=hashes,
            columns=self.columns.named,
            encoder=fingerprint(self.encoder),
            keep=sorted(self.keep),
            # The first looks beside the records, the last in the working directory, which rarely decides anything.
            folders=[str(folder) for folder in finder.folders[1:-1]],
            confined=finder.within is not None,
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]

    def open(self, plan: Plan) -> Index | None:
        """Open what is there; where that is damaged or, as far as is looked, of other images, it is removed."""
        # Another start may put it there from now on.
        if not plan.place.exists():
            return None
        index = open_made(plan.place, plan.files, self.cache)
        if index is not None:
            if not self._pictures_changed(plan, index):
                return index
            shutil.rmtree(plan.parts, ignore_errors=True)
        with writable(self.cache):
            # Without its header it is no index.
            (plan.place / HEADER).unlink(missing_ok=True)
        shutil.rmtree(plan.place, ignore_errors=True)
        return None

    def _pictures_changed(self, plan: Plan, index: Index) -> bool:
        """Tell whether an image that was looked at is another file now, or lies elsewhere; reads no image.

        Unless all are to be checked, only the images of records with a fault are looked at: somebody may have corrected
        them. A run may have met the fault later (DOUBTS).
        """
        if index.header["working_directory"] not in (None, str(self.encoder.finder.folders[-1])):
            return True
        if index.header["inside"] and not index.pictures.is_dir():
            return True
        seen = index.reader("pictures.arrow").read_all()
        if not self.check_images:
            looked, doubts = index["tokens"] == 0, index.place / DOUBTS
            if doubts.exists():
                looked[[int(row) for row in doubts.read_text().split()]] = True
            seen = seen.filter(pa.array(looked))
        encoders = self._parts(plan).encoders
        with ThreadPoolExecutor(LOOKING_THREADS) as pool:
            return any(pool.map(lambda batch: changed(batch, encoders), seen.to_batches(LOOKED_ROWS)))

    def _parts(self, plan: Plan) -> Parts:
        return Parts(plan, self.encoder, self.keep, self.cache)

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
        self, plan: Plan, share: int = 0, shares: int = 1, sharers: int = 1, asked: Callable[[], bool] = lambda: False
    ) -> None:
        """Make the parts of one of several shares, as far as they are not there and nobody asks to stop.

        Raises:
            UserError: a file cannot be read, or the cache not written.
        """
        own = range(share, len(plan.pieces), shares)
        made = from_workers(self._parts(plan).make, own, processes(len(own), sharers))
        for _ in track(made, "indexing records", total=len(own), quiet=self.quiet):
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
        finder, pictures = self.encoder.finder, folder_of_pictures(self.cache)
        try:
            count = write_index(partial, self._made(plan), self.keep, finder, plan.source, pictures)
            sources.check_unchanged(plan.files, plan.stamps)
            if not count:
                raise sources.no_record(self.data_path)
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            own = open_made(partial, plan.files, self.cache)
            if own is None:
                how = "look at the disk, or use --cache_dir"
                raise UserError(f"{self.cache}: cannot be read back as it was written; {how}")
            return put(own, place, self.cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _made(self, plan: Plan) -> Iterator[pa.Table]:
        """Yield the parts in their order."""
        parts = self._parts(plan)
        for number in track(range(len(plan.pieces)), "joining the index", quiet=self.quiet):
            yield parts.read(number, self.check_images)
            self.tick()
