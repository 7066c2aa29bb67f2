"""A part of an index under way: what one piece of the records became, in a file of its own.

Any process of any rank makes any part, and of the same piece always the same. What a killed start has made, the next
one finds.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mirage_ds.config.columns import Columns
from mirage_ds.data import sources
from mirage_ds.data.encode import Encoder, beside_each
from mirage_ds.data.images import Key
from mirage_ds.data.index import HEADER, IMAGES, NUMBERS
from mirage_ds.data.inside import folder_of_pictures, writable
from mirage_ds.data.record import Fault, Record, RecordError, to_json
from mirage_ds.data.record_files import read_piece
from mirage_ds.data.sources import Piece, Stamp
from mirage_ds.files import write_new

# Of a row, as sample.Measure has them.
COUNTS = ("tokens", "labels", "runs", "latents")
# The image files that a record shows, each with its Sight.
PICTURES = pa.list_(pa.struct({"path": pa.string(), "place": pa.int32(), "bytes": pa.int64(), "mtime_ns": pa.int64()}))


class Plan(NamedTuple):
    """What an index is to be made of; the same for every process that works on it.

    Attributes:
        place: of the index, whose name is its key.
        files, stamps: the records, and what they were before they were read.
        source: hash of them (sources.data_hash).
        pieces: of the files, in their order; none before `Maker.begin`.
        columns: see make_index.Maker.
    """

    place: Path
    files: tuple[Path, ...]
    stamps: list[Stamp]
    source: str
    pieces: list[Piece]
    columns: Columns

    @property
    def parts(self) -> Path:
        """Folder of the parts that are made already."""
        return self.place.with_name(f".{self.place.name}.parts")


def part_schema(keep: Sequence[str]) -> pa.Schema:
    """Return the columns of a part: a row a record, with the image files that it shows.

    Args:
        keep: the fields whose features are kept.
    """
    own = {"content": pa.binary(), "pictures": PICTURES} | {name: IMAGES for name in keep}
    return pa.schema([*NUMBERS, *own.items()])


def write_part(place: Path, part: pa.Table) -> None:
    """Write a part, whole or not at all."""
    content = pa.BufferOutputStream()
    with pa.ipc.new_stream(content, part.schema) as stream:
        stream.write_table(part)
    # For gzip's check of the content rather than for its size.
    write_new(place, gzip.compress(content.getvalue(), compresslevel=1))


def read_part(place: Path) -> pa.Table | None:
    """Read a part; None where there is none, or a damaged one."""
    try:
        return pa.ipc.open_stream(gzip.decompress(place.read_bytes())).read_all()
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid):
        return None


def changed(rows: pa.Table | pa.RecordBatch, encoders: Sequence[Encoder]) -> bool:
    """Tell whether an image is another file now than when it was seen, or lies elsewhere; reads none.

    Args:
        rows: `file` and `pictures` of some records.
        encoders: of the records files; their finders look for the images.
    """
    shown = zip(rows["file"].to_pylist(), rows["pictures"].to_pylist(), strict=True)
    seen = {(file, *picture.values()) for file, pictures in shown for picture in pictures}
    return any(encoders[file].finder.sight(path) != tuple(sight) for file, path, *sight in seen)


class Parts:
    """The parts of an index.

    Args:
        cache: the folder that --cache_dir names.
    """

    def __init__(self, plan: Plan, encoder: Encoder, keep: Sequence[str], cache: Path):
        self.plan, self.keep, self.cache = plan, keep, cache
        self.pictures = folder_of_pictures(cache)
        self.encoders = beside_each(encoder, plan.files, self.pictures)

    def make(self, number: int) -> None:
        """Make the part of a piece, unless it is there.

        Raises:
            UserError: its file cannot be read or has changed, or the cache not written.
        """
        place = self.plan.parts / str(number)
        # Another run may have put the index together meanwhile, and removed its parts.
        if place.exists() or (self.plan.place / HEADER).exists():
            return
        file = self.plan.pieces[number].file
        part = self.encode(number)
        # The folder of parts belongs to the records as they were hashed.
        sources.check_unchanged([self.plan.files[file]], [self.plan.stamps[file]])
        with writable(self.cache):
            write_part(place, part)

    def read(self, number: int, check_images: bool) -> pa.Table:
        """Return the part of a piece, made anew where it is gone, damaged, or of images that have changed.

        Args:
            check_images: all images are looked at, not only those of records with a fault.
        """
        part = read_part(self.plan.parts / str(number))
        if part is not None:
            looked = part if check_images else part.filter(pc.equal(part["tokens"], 0))
            if not changed(looked, self.encoders):
                return part
        return self.encode(number)

    def encode(self, number: int) -> pa.Table:
        """Read, check and encode the records of a piece.

        Returns:
            A row of part_schema for each.

        Raises:
            UserError: its file cannot be read, or the cache not written.
        """
        piece = self.plan.pieces[number]
        file, encoder = self.plan.files[piece.file], self.encoders[piece.file]
        rows = []
        for found in read_piece(piece, file, self.pictures, self.plan.columns):
            paths = () if isinstance(found, Fault) else found.images(helpers=encoder.helped)
            # Before they are read: what is written meanwhile is noticed by whoever compares.
            pictures = [{"path": path} | encoder.finder.sight(path)._asdict() for _, path in paths]
            rows.append(encode_row(found, encoder, self.keep) | {"file": piece.file, "pictures": pictures})
        return pa.Table.from_pylist(rows, part_schema(self.keep))


def encode_row(record: Record | Fault, encoder: Encoder, keep: Sequence[str]) -> dict[str, Any]:
    """Encode a record and check its images; return its row of a part, without its file and its pictures."""
    if isinstance(record, Fault):
        return faulty_row(record, keep)
    keys: dict[str, list[Key]] = {name: [] for name in keep}
    try:
        layout = encoder.lay_out(record)
        for name, path in record.images(helpers=encoder.helped):
            if name in keep:
                keys[name].append(encoder.finder.key(record, name, path))
            else:
                encoder.finder.check(record, name, path)
    except RecordError as error:
        return faulty_row(error.fault, keep)
    measure = encoder.measure_of(layout)
    sizes = {"image_input": measure.images, "image_output": measure.helpers}
    images = {name: [{"key": k, "size": n} for k, n in zip(keys[name], sizes[name], strict=True)] for name in keep}
    rest = json.dumps(layout[1:])
    counts = {name: getattr(measure, name) for name in COUNTS}
    counts["patches"] = sum(time * height * width for time, height, width in layout.grids + layout.helper_grids)
    return counts | images | {"line": record.line} | packed(layout.input_ids, rest, to_json(record))


def faulty_row(fault: Fault, keep: Sequence[str]) -> dict[str, Any]:
    """Return the row of a record that cannot be used: nothing but its line and its fault."""
    nothing: dict[str, Any] = dict.fromkeys((*COUNTS, "patches"), 0) | {name: [] for name in keep}
    return nothing | {"line": fault.line} | packed([], json.dumps(asdict(fault)))


def packed(ids: Sequence[int] | np.ndarray, *lines: str) -> dict[str, Any]:
    """Return a row's content as rows.bin has it, with its length and check."""
    content = np.asarray(ids, dtype=np.int32).tobytes() + "\n".join(lines).encode()
    return {"content": content, "bytes": len(content), "check": zlib.crc32(content)}
