"""The parts of an index under way: what each piece of the records became, in a file of its own.

Any process of any rank makes any part, and of the same piece always the same. What a killed start has made, the next
one finds.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch

from mirage_ds.data import sources
from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import Key, image_key
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.index import (
    COLUMNS,
    FAULT_SCHEMA,
    HEADER,
    PICTURE_SCHEMA,
    RECORD_SCHEMA,
    ROW_SCHEMA,
    Sight,
    changed,
    layout_check,
    record_check,
    sight,
)
from mirage_ds.data.inside import folder_of_pictures, writable
from mirage_ds.data.record import Fault, Record, RecordError
from mirage_ds.data.record_files import row_of
from mirage_ds.data.sample import Layout, Measure
from mirage_ds.data.sources import Piece, Stamp, check_unchanged
from mirage_ds.errors import UserError
from mirage_ds.files import write_new

Found = TypeVar("Found")
# Name (see `schemas`) → table.
Part = dict[str, pa.Table]

# What a process remembers of the image files that it has looked at: so many answers.
REMEMBERED = 100_000
NOTHING = Layout([], 0, [], [])
CRC_BYTES = 4


class Plan(NamedTuple):
    """What an index is to be made of; the same for every process that works on it.

    Attributes:
        place: of the index, whose name is its key.
        files, stamps: the records, and what they were before they were read.
        source: hash of them (sources.data_hash).
        pieces: of the files, in their order; none before `Maker.begin`.
    """

    place: Path
    files: tuple[Path, ...]
    stamps: list[Stamp]
    source: str
    pieces: list[Piece]

    @property
    def parts(self) -> Path:
        """Folder of the parts that are made already."""
        return self.place.with_name(f".{self.place.name}.parts")


def schemas(keep: Sequence[str]) -> dict[str, pa.Schema]:
    """Return the tables of a part.

    numbers: COLUMNS of each row, and how many images of each kept field it has; records, rows: as in the index; faults:
    row counts within the part; pictures: the image files looked at; suspects: those of faulty records; and for each
    kept field its images' keys and sizes, row by row.
    """
    numbers = [(name, pa.from_numpy_dtype(dtype)) for name, dtype in COLUMNS.items()]
    images = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("size", pa.int32())])
    return {
        "numbers": pa.schema([*numbers, *((name, pa.int64()) for name in keep)]),
        "records": RECORD_SCHEMA,
        "rows": ROW_SCHEMA,
        "faults": FAULT_SCHEMA,
        "pictures": PICTURE_SCHEMA,
        "suspects": PICTURE_SCHEMA,
        **dict.fromkeys(keep, images),
    }


def write_part(place: Path, part: Part) -> None:
    """Write a part, whole or not at all."""
    content = io.BytesIO()
    for table in part.values():
        with pa.ipc.new_stream(content, table.schema) as stream:
            stream.write_table(table)
    body = content.getvalue()
    write_new(place, zlib.crc32(body).to_bytes(CRC_BYTES, "big") + body)


def read_part(place: Path, keep: Sequence[str]) -> Part | None:
    """Read a part; None where there is none, or a damaged one."""
    try:
        content = memoryview(place.read_bytes())
    except FileNotFoundError:
        return None
    body = content[CRC_BYTES:]
    if zlib.crc32(body).to_bytes(CRC_BYTES, "big") != content[:CRC_BYTES]:
        return None
    source = pa.BufferReader(body)
    return {name: pa.ipc.open_stream(source).read_all() for name in schemas(keep)}


@dataclass(frozen=True)
class _Remembering(ImageFinder):
    """Looks at each image once, however many records show it.

    Attributes:
        seen: (what was asked, path) → the answer, or the fault that it came to.
    """

    seen: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False)

    def _once(self, what: str, path: str, ask: Callable[[], Found], record: Record, name: str) -> Found:
        if (what, path) not in self.seen:
            if len(self.seen) >= REMEMBERED:
                self.seen.pop(next(iter(self.seen)))
            try:
                self.seen[what, path] = ask()
            except RecordError as error:
                self.seen[what, path] = error.fault
        answer: Any = self.seen[what, path]
        if isinstance(answer, Fault):
            raise RecordError(replace(answer, line=record.line, field=name))
        return answer

    def sight(self, record: Record, name: str, path: str) -> Sight:
        """Look for the image, reading nothing."""
        return self._once("sight", path, lambda: sight(self, path), record, name)

    def find(self, record: Record, name: str, path: str) -> Path:
        """See ImageFinder."""
        # Before it is read: what is written meanwhile is noticed by whoever compares.
        self.sight(record, name, path)
        return self._once("place", path, lambda: super(_Remembering, self).find(record, name, path), record, name)

    def size(self, record: Record, name: str, path: str) -> tuple[int, int]:
        """See ImageFinder."""
        return self._once("size", path, lambda: super(_Remembering, self).size(record, name, path), record, name)

    def check(self, record: Record, name: str, path: str) -> None:
        """RecordError unless the image decodes."""
        self._once("picture", path, lambda: bool(self.load(record, name, path)), record, name)

    def key(self, record: Record, name: str, path: str) -> Key:
        """Return the key of the image's content; RecordError where it cannot be read."""

        def read() -> Key:
            place = self.find(record, name, path)
            try:
                return image_key(place)
            except OSError as error:
                raise record.fault(
                    name, f"image {place} cannot be read ({error.strerror})", "make it readable"
                ) from None

        return self._once("key", path, read, record, name)


class Parts(torch.utils.data.Dataset):
    """Makes the part of a piece when it is asked for, unless it is there; an error is returned, not raised.

    A worker's exception would lose its words.

    Args:
        cache: the folder that --cache_dir names.
    """

    def __init__(self, plan: Plan, encoder: Encoder, keep: Sequence[str], cache: Path):
        self.plan, self.encoder, self.keep, self.cache = plan, encoder, keep, cache
        self.pictures = folder_of_pictures(cache)
        self.first: dict[Path, int] = {}
        for number, file in enumerate(plan.files):
            self.first.setdefault(file.parent, number)
        self._beside: dict[int, tuple[Encoder, _Remembering]] = {}

    def __len__(self) -> int:
        return len(self.plan.pieces)

    def place(self, number: int) -> Path:
        """Where the part of a piece lies."""
        return self.plan.parts / str(number)

    def __getitem__(self, number: int) -> UserError | None:
        # Another run may have put the index together meanwhile, and removed its parts.
        if self.place(number).exists() or (self.plan.place / HEADER).exists():
            return None
        file = self.plan.pieces[number].file
        try:
            part = self.encode(number)
            # The folder of parts belongs to the records as they were hashed.
            check_unchanged([self.plan.files[file]], [self.plan.stamps[file]])
            with writable(self.cache):
                write_part(self.place(number), part)
        except UserError as error:
            return error
        return None

    def read(self, number: int, check_images: bool) -> Part:
        """Return the part of a piece, made anew where it is gone, damaged, or of images that have changed.

        Args:
            check_images: all images are looked at, not only those of records with a fault.
        """
        part = read_part(self.place(number), self.keep)
        looked = "pictures" if check_images else "suspects"
        if part is None or changed(part[looked], self.encoder.finder, self.plan.files, self.pictures):
            return self.encode(number)
        return part

    def _of_folder(self, first: int) -> tuple[Encoder, _Remembering]:
        if first not in self._beside:
            own = self.encoder.finder.of(self.plan.files[first], self.pictures)
            finder = _Remembering(own.folders, own.within)
            self._beside[first] = replace(self.encoder, finder=finder), finder
        return self._beside[first]

    def encode(self, number: int) -> Part:
        """Read, check and encode the records of a piece.

        Raises:
            UserError: its file cannot be read, or the cache not written.
        """
        piece = self.plan.pieces[number]
        first = self.first[self.plan.files[piece.file].parent]
        encoder, finder = self._of_folder(first)
        made: dict[str, list[tuple[Any, ...]]] = {name: [] for name in schemas(self.keep)}
        for found in sources.read_piece(piece, self.plan.files[piece.file], self.pictures):
            if isinstance(found, Fault):
                made["faults"].append((-1, piece.file, found.line, found.field, found.what, found.how))
                continue
            named = list(found.images(helpers=encoder.stage == "stage1"))
            layout, measure, keys = NOTHING, Measure(0, 0, 0, (), ()), {name: list[Key]() for name in self.keep}
            try:
                layout = encoder.lay_out(found)
                for name, path in named:
                    if name in self.keep:
                        keys[name].append(finder.key(found, name, path))
                    else:
                        finder.check(found, name, path)
                measure = encoder.measure_of(layout)
            except RecordError as error:
                fault, layout, keys = error.fault, NOTHING, {name: [] for name in self.keep}
                row = len(made["rows"])
                made["faults"].append((row, piece.file, fault.line, fault.field, fault.what, fault.how))
                made["suspects"] += [(first, path, *finder.sight(found, name, path)) for name, path in named]
            made["pictures"] += [(first, path, *finder.sight(found, name, path)) for name, path in named]
            sizes = {"image_input": measure.images, "image_output": measure.helpers}
            for name in self.keep:
                made[name] += [(*key, size) for key, size in zip(keys[name], sizes[name], strict=True)]
            written = row_of(found)
            made["records"].append(tuple(written[name] for name in RECORD_SCHEMA.names))
            flat = [[side for grid in grids for side in grid] for grids in (layout.grids, layout.helper_grids)]
            ids = np.asarray(layout.input_ids, dtype=np.int32)
            made["rows"].append((ids, layout.answer_start, *flat, found.image_input, found.image_output))
            patches = sum(time * height * width for time, height, width in layout.grids + layout.helper_grids)
            made["numbers"].append(
                (
                    *(found.line, piece.file, measure.tokens, measure.labels, measure.runs, patches),
                    *(record_check(written), layout_check(layout, found)),
                    *(len(keys[name]) for name in self.keep),
                )
            )
        for name in ("pictures", "suspects"):
            made[name] = sorted(set(made[name]))
        return {name: _table(made[name], schema) for name, schema in schemas(self.keep).items()}


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in schema]
    made = [pa.array(column, type=kind.type) for column, kind in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(made, schema=schema)
