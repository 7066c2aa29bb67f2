"""Making the index of a records source (data/index.py): several processes read, check and encode, one writes.

R rows, I images of a field, T tokens of a row.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import pyarrow as pa
import tokenizers
import torch
import transformers
from rich.progress import track

from mirage_ds.config import cache_folder
from mirage_ds.data import encode, images, inside, messages, record, record_files, sample, sources
from mirage_ds.data import index as on_disk
from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import Key, image_key
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.index import (
    BATCH_ROWS,
    COLUMNS,
    FAULT_SCHEMA,
    FORMAT,
    HEADER,
    PICTURE_BATCH,
    PICTURE_SCHEMA,
    RECORD_SCHEMA,
    ROW_SCHEMA,
    DamagedError,
    EncodedRows,
    Sight,
    crc_of,
    digest_of,
    layout_check,
    record_check,
    sight,
)
from mirage_ds.data.record import Fault, Record, RecordError
from mirage_ds.data.record_files import row_of
from mirage_ds.data.sample import Layout, Measure
from mirage_ds.data.sources import Piece, Stamp
from mirage_ds.errors import UserError
from mirage_ds.files import sync
from mirage_ds.mixture import Records
from mirage_ds.stop import ignore_in_worker

Found = TypeVar("Found")

# Image files that a process remembers to have looked at.
REMEMBERED = 50_000
MOST_PROCESSES = 16
# What a killed run has left behind is removed by a later one, that no longer takes it for another's work in progress.
ABANDONED_S = 24 * 3600.0
NOTHING = Layout([], 0, [], [])


def nothing() -> None:
    """Be the `tick` of work that nobody watches."""


# ------------------------------------------------------------------------------------------------ what one process does


@dataclass(frozen=True)
class _Remembering(ImageFinder):
    """Looks at each image once, however many records show it.

    Attributes:
        seen: (what was asked, path) → the answer, or the fault that it came to.
        new: the images looked at since somebody last emptied it.
    """

    seen: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False)
    new: list[tuple[str, Sight]] = field(default_factory=list, compare=False)

    def _once(self, what: str, asking: Record, name: str, path: str, ask: Callable[[], Found]) -> Found:
        if (what, path) not in self.seen:
            if len(self.seen) >= REMEMBERED:
                self.seen.pop(next(iter(self.seen)))
            try:
                self.seen[what, path] = ask()
            except RecordError as error:
                self.seen[what, path] = error.fault
        answer: Any = self.seen[what, path]
        if isinstance(answer, Fault):
            raise RecordError(replace(answer, line=asking.line, field=name))
        return answer

    def find(self, asking: Record, name: str, path: str) -> Path:
        """See ImageFinder."""

        def look() -> Path:
            # Before it is read: what is written meanwhile is noticed at the next start.
            self.new.append((path, sight(self, path)))
            return super(_Remembering, self).find(asking, name, path)

        return self._once("place", asking, name, path, look)

    def size(self, asking: Record, name: str, path: str) -> tuple[int, int]:
        """See ImageFinder."""
        return self._once("size", asking, name, path, lambda: super(_Remembering, self).size(asking, name, path))

    def check(self, asking: Record, name: str, path: str) -> None:
        """RecordError unless the image decodes."""

        def decode() -> bool:
            self.load(asking, name, path)
            return True

        self._once("picture", asking, name, path, decode)

    def key(self, asking: Record, name: str, path: str) -> Key:
        """Return the key of the image's content; RecordError where it cannot be read."""

        def read() -> Key:
            place = self.find(asking, name, path)
            try:
                return image_key(place)
            except OSError as error:
                raise asking.fault(
                    name, f"image {place} cannot be read ({error.strerror})", "make it readable"
                ) from None

        return self._once("key", asking, name, path, read)


class Part(NamedTuple):
    """What a piece of the source became.

    Attributes:
        records, rows: the same rows as Arrow tables.
        columns: name (index.COLUMNS) → (R,).
        images: kept field → its images' keys (I, 2), sizes (I,) and number in each row (R,).
        faults, pictures: tables.
        total: records, whether or not they have the format.
    """

    records: pa.Table
    rows: pa.Table
    columns: dict[str, np.ndarray]
    images: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    faults: pa.Table
    pictures: pa.Table
    total: int


class _Pieces(torch.utils.data.Dataset):
    """Encodes a piece when it is asked for; an error arrives as a value, since a worker's exception loses its words."""

    def __init__(
        self, work: Sequence[Piece], files: Sequence[Path], encoder: Encoder, keep: Sequence[str], pictures: Path
    ):
        self.work, self.files, self.encoder, self.keep, self.pictures = work, files, encoder, keep, pictures
        self.first: dict[Path, int] = {}
        for number, file in enumerate(files):
            self.first.setdefault(file.parent, number)
        self.made: dict[int, tuple[Encoder, _Remembering]] = {}

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, number: int) -> Part | UserError:
        try:
            return self._encode(self.work[number])
        except UserError as error:
            return error

    def _beside(self, first: int) -> tuple[Encoder, _Remembering]:
        if first not in self.made:
            own = self.encoder.finder.of(self.files[first], self.pictures)
            finder = _Remembering(own.folders, own.within)
            self.made[first] = replace(self.encoder, finder=finder), finder
        return self.made[first]

    def _encode(self, piece: Piece) -> Part:
        first = self.first[self.files[piece.file].parent]
        encoder, finder = self._beside(first)
        finder.new.clear()
        records: list[dict[str, Any]] = []
        rows: list[tuple[Any, ...]] = []
        numbers: list[tuple[Any, ...]] = []
        faults: list[tuple[Any, ...]] = []
        keys: dict[str, list[Key]] = {name: [] for name in self.keep}
        sizes: dict[str, list[int]] = {name: [] for name in self.keep}
        counts: dict[str, list[int]] = {name: [] for name in self.keep}
        for found in sources.read_piece(piece, self.files[piece.file], self.pictures):
            if isinstance(found, Fault):
                faults.append((-1, piece.file, found.line, found.field, found.what, found.how))
                continue
            layout, measure, own = NOTHING, Measure(0, 0, 0, (), ()), {name: list[Key]() for name in self.keep}
            try:
                layout = encoder.lay_out(found)
                for name, path in found.images(helpers=encoder.stage == "stage1"):
                    if name in self.keep:
                        own[name].append(finder.key(found, name, path))
                    else:
                        finder.check(found, name, path)
                measure = encoder.measure_of(layout)
            except RecordError as error:
                fault, layout, own = error.fault, NOTHING, {name: [] for name in self.keep}
                faults.append((len(rows), piece.file, fault.line, fault.field, fault.what, fault.how))
            for name in self.keep:
                keys[name] += own[name]
                sizes[name] += measure.images if name == "image_input" else measure.helpers
                counts[name].append(len(own[name]))
            written = row_of(found)
            records.append(written)
            flat = [[side for grid in grids for side in grid] for grids in (layout.grids, layout.helper_grids)]
            rows.append(
                (
                    *(np.asarray(layout.input_ids, dtype=np.int32), layout.answer_start, *flat),
                    *(found.image_input, found.image_output),
                )
            )
            patches = sum(time * height * width for time, height, width in layout.grids + layout.helper_grids)
            numbers.append(
                (
                    *(found.line, piece.file, measure.tokens, measure.labels, measure.runs, patches),
                    *(record_check(written), layout_check(layout, found)),
                )
            )
        columns = zip(*numbers, strict=True) if numbers else ([] for _ in COLUMNS)
        return Part(
            records=pa.Table.from_pylist(records, schema=RECORD_SCHEMA),
            rows=_table(rows, ROW_SCHEMA),
            columns={
                name: np.array(column, dtype=dtype)
                for (name, dtype), column in zip(COLUMNS.items(), columns, strict=True)
            },
            images={
                name: (
                    np.array(keys[name], dtype=np.uint64).reshape(-1, 2),
                    np.array(sizes[name], dtype=np.int32),
                    np.array(counts[name], dtype=np.int64),
                )
                for name in self.keep
            },
            faults=_table(faults, FAULT_SCHEMA),
            pictures=_table([(first, path, *seen) for path, seen in finder.new], PICTURE_SCHEMA),
            total=len(rows) + sum(fault[0] < 0 for fault in faults),
        )


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in schema]
    made = [pa.array(column, type=kind.type) for column, kind in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(made, schema=schema)


def _as_it_is(part: Part | UserError) -> Part | UserError:
    return part


# ------------------------------------------------------------------------------------------------- what the writer does


class _Writer:
    """Writes parts, one behind the other, into the files of an index."""

    def __init__(self, folder: Path, keep: Sequence[str], stack: ExitStack):
        self.folder = folder
        self.rows = self.count = self.faults = 0
        self.images = dict.fromkeys(keep, 0)
        self.pictures: list[pa.Table] = []
        kinds: dict[str, tuple[Any, tuple[int, ...]]] = {name: (dtype, ()) for name, dtype in COLUMNS.items()}
        kinds["batch"] = (np.int64, ())
        for name in keep:
            kinds |= {f"{name}.keys": (np.uint64, (2,)), f"{name}.sizes": (np.int32, ())}
            kinds[f"{name}.starts"] = (np.int64, ())
        self.kinds = kinds
        self.written = dict.fromkeys(kinds, 0)
        self.columns = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in kinds}
        self.tables = {
            name: stack.enter_context(pa.ipc.new_file(stack.enter_context((folder / name).open("wb")), schema))
            for name, schema in (
                ("records.arrow", RECORD_SCHEMA),
                ("rows.arrow", ROW_SCHEMA),
                ("faults.arrow", FAULT_SCHEMA),
            )
        }
        for name in keep:
            self._append(f"{name}.starts", np.zeros(1))

    def _append(self, name: str, numbers: np.ndarray) -> None:
        self.columns[name].write(np.ascontiguousarray(numbers, dtype=self.kinds[name][0]).data)
        self.written[name] += len(numbers)

    def add(self, part: Part) -> None:
        """Append a part."""
        for name, numbers in part.columns.items():
            self._append(name, numbers)
        for name, (keys, sizes, counts) in part.images.items():
            self._append(f"{name}.keys", keys)
            self._append(f"{name}.sizes", sizes)
            self._append(f"{name}.starts", self.images[name] + np.cumsum(counts))
            self.images[name] += len(keys)
        self._append("batch", self.rows + np.arange(0, len(part.rows), BATCH_ROWS))
        for table, name in ((part.records, "records.arrow"), (part.rows, "rows.arrow")):
            for batch in table.to_batches(BATCH_ROWS):
                if len(batch):
                    self.tables[name].write_batch(batch)
        row = part.faults["row"].to_numpy()
        here = pa.array(np.where(row < 0, row, row + self.rows))
        self.tables["faults.arrow"].write_table(part.faults.set_column(0, "row", here))
        self.pictures.append(part.pictures)
        self.rows += len(part.rows)
        self.count += part.total
        self.faults += len(part.faults)

    def finish(self, finder: ImageFinder, source: str) -> None:
        """Write the images looked at, and the header; the other files are closed."""
        seen = pa.concat_tables([PICTURE_SCHEMA.empty_table(), *self.pictures]).combine_chunks()
        # Every process has looked at the images that its records show.
        seen = seen.group_by(PICTURE_SCHEMA.names, use_threads=False).aggregate([])
        seen = seen.sort_by([(name, "ascending") for name in PICTURE_SCHEMA.names])
        with (self.folder / "pictures.arrow").open("wb") as file, pa.ipc.new_file(file, PICTURE_SCHEMA) as writer:
            writer.write_table(seen, PICTURE_BATCH)
        last = len(finder.folders) - 1
        place = seen["place"].to_numpy()
        columns = {
            name: (np.dtype(dtype).str, (self.written[name], *rest)) for name, (dtype, rest) in self.kinds.items()
        }
        # The rows themselves are checked one by one, when they are read.
        big = ("records.arrow", "rows.arrow")
        files = {
            file.name: (file.stat().st_size, None if file.name in big else crc_of(file))
            for file in sorted(self.folder.iterdir())
        }
        header = dict(
            format=FORMAT,
            source=source,
            records=self.count,
            faults=self.faults,
            # Where it decides nothing, a run in another folder finds the same rows.
            working_directory=str(finder.folders[last]) if ((place == last) | (place < 0)).any() else None,
            columns=columns,
            files=files,
        )
        header["digest"] = digest_of(header)
        (self.folder / HEADER).write_text(json.dumps(header))


def processes(work: int) -> int:
    """Choose how many processes encode; none where the work is a single piece."""
    return 0 if work < 2 else min(work, MOST_PROCESSES, len(os.sched_getaffinity(0)))


def _make(
    place: Path,
    data_path: Records,
    files: Sequence[Path],
    stamps: Sequence[Stamp],
    encoder: Encoder,
    keep: Sequence[str],
    cache: Path,
    source: str,
    quiet: bool,
    tick: Callable[[], None],
) -> EncodedRows:
    """Write an index, put it at `place`, and return it opened."""
    work = list(sources.pieces(files))
    loader: Any = torch.utils.data.DataLoader(
        _Pieces(work, files, encoder, keep, inside.folder_of_pictures(cache)),
        batch_size=None,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # there are no batches
        num_workers=processes(len(work)),
        worker_init_fn=ignore_in_worker,
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place.parent)
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        with ExitStack() as stack:
            writer = _Writer(partial, keep, stack)
            for part in track(loader, "indexing records", total=len(work), disable=quiet, transient=True):
                if isinstance(part, UserError):
                    raise part
                writer.add(part)
                tick()
        if not writer.count:
            raise sources.no_record(data_path)
        moved = sources.changed(files, stamps)
        if moved:
            raise UserError(f"{moved}: changed while it was read; leave it alone and start again")
        writer.finish(encoder.finder, source)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        own = open_made(partial, files, cache)
        if own is None:
            raise UserError(f"{cache}: cannot be read back as it was written; look at the disk, or use --cache_dir")
        return _put(own, place, cache)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(own: EncodedRows, place: Path, cache: Path) -> EncodedRows:
    """Rename a whole index to its place, and return it opened.

    What lies there is damaged or old, or another run has just made the same: then that one stays.
    """
    partial = own.place
    while True:
        theirs = open_made(place, own.files, cache)
        if theirs and theirs.same_as(own):
            return theirs
        old = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            place.replace(old)
            shutil.rmtree(old, ignore_errors=True)
        try:
            partial.replace(place)
        except OSError:
            # Another run was quicker.
            if place.exists():
                continue
            raise
        sync(place.parent)
        # Opened before it was in reach of other runs, one of which may be putting another in its place.
        own.place = place
        return own


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(".*"):
        try:
            old = time.time() - left.stat().st_mtime > ABANDONED_S
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- opening


def _settings(processor: Any) -> dict[str, Any]:
    size = {edge: int(processor.size[edge]) for edge in ("shortest_edge", "longest_edge")}
    return {
        "size": size,
        **{name: getattr(processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")},
    }


def _tokenizer_text(tokenizer: Any) -> str:
    # What was asked of it last is no part of it.
    made = copy.deepcopy(tokenizer.backend_tokenizer)
    made.no_padding()
    made.no_truncation()
    return str(made.to_str()) + str(tokenizer.chat_template)


def key_of(files: Sequence[Path], hashes: Sequence[str], encoder: Encoder, keep: Sequence[str]) -> str:
    """Hash of all that an index is a function of, but for the images, which are compared with it at each start."""
    finder = encoder.finder
    modules = (encode, sample, messages, record, record_files, images, inside, sources, on_disk)
    code = b"".join(Path(file).read_bytes() for file in (*(str(module.__file__) for module in modules), __file__))
    values = dict(
        format=FORMAT,
        # So that nobody who mends the encoding trains on rows from before.
        code=hashlib.sha256(code).hexdigest(),
        libraries=[transformers.__version__, tokenizers.__version__, PIL.__version__],
        records=[(str(file.parent.resolve()), content) for file, content in zip(files, hashes, strict=True)],
        tokenizer=hashlib.sha256(_tokenizer_text(encoder.tokenizer).encode()).hexdigest(),
        images=_settings(encoder.images),
        helpers=_settings(encoder.helpers),
        stage=encoder.stage,
        latent_size=encoder.latent_size,
        slots=encoder.slots,
        # It refuses what cannot be pooled; which feature goes where is no part of the index.
        compress=encoder.compress,
        keep=sorted(keep),
        # The first looks beside the records, the last in the working directory, which rarely decides anything.
        folders=[str(folder) for folder in finder.folders[1:-1]],
        confined=finder.within is not None,
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def open_made(place: Path, files: Sequence[Path], cache: Path) -> EncodedRows | None:
    """Open an index; None where there is none, or a damaged one."""
    try:
        return EncodedRows(place, files, inside.folder_of_pictures(cache))
    except DamagedError:
        return None


def open_index(
    data_path: Records,
    encoder: Encoder,
    keep: Sequence[str] = (),
    cache_dir: Path | None = None,
    quiet: bool = True,
    tick: Callable[[], None] = nothing,
) -> EncodedRows:
    """Open the index of a records source; it is made first where there is none, and anew where it does not hold.

    Args:
        encoder: its finder looks for images beside each file, wherever it was made for.
        keep: fields ("image_input", "image_output") whose features are kept: their images get keys here and are decoded
            by whoever makes the features.
        cache_dir: holds the index; ~/.cache/mirage_ds if None.
        quiet: show no progress.
        tick: is called again and again while an index is made.

    Raises:
        UserError: a file is missing, cannot be read or changes meanwhile, there is no record, or no room.
    """
    cache = cache_folder(cache_dir)
    files = sources.find_files(data_path)
    # Before they are read.
    stamps = sources.stamps(files)
    hashes = [sources.content_hash(file, cache) for file in files]
    place = cache / "index" / key_of(files, hashes, encoder, keep)
    rows = open_made(place, files, cache)
    if rows is None or rows.pictures_changed(encoder.finder):
        with inside.writable(cache):
            source = sources.data_hash(hashes)
            rows = _make(place, data_path, files, stamps, encoder, keep, cache, source, quiet, tick)
    return rows
