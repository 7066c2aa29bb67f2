"""A part of an index under way: what one piece of the records became, in a file of its own.

Any process of any rank makes any part, and of the same piece always the same. What a killed start has made, the next
one finds.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mirage_ds.data import sources
from mirage_ds.data.encode import BesideEach, Encoder
from mirage_ds.data.images import Key, RememberingFinder, changed
from mirage_ds.data.index import COLUMNS, HEADER, PICTURE_SCHEMA, ROW_FILES, check_of, seen_in, written
from mirage_ds.data.inside import folder_of_pictures, writable
from mirage_ds.data.record import Fault, Record, RecordError, to_json
from mirage_ds.data.record_files import read_piece
from mirage_ds.data.sample import NO_MEASURE, Layout
from mirage_ds.data.sources import Piece, Stamp
from mirage_ds.errors import UserError
from mirage_ds.files import write_new

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


class Part(NamedTuple):
    """What a piece of the records became.

    Attributes:
        rows: COLUMNS, those of ROW_FILES, and for each field whose features are kept `<field>.keys` (a list of two
            numbers an image) and `<field>.sizes`.
        faults: one line of faults.jsonl each.
        pictures: PICTURE_SCHEMA, and `faulty`: a record with a fault names it.
    """

    rows: pa.Table
    faults: pa.Table
    pictures: pa.Table

    @staticmethod
    def schemas(keep: Sequence[str]) -> dict[str, pa.Schema]:
        """Return the schema of each table.

        Args:
            keep: the fields whose features are kept.
        """
        rows: dict[str, pa.DataType] = {name: pa.from_numpy_dtype(dtype) for name, dtype in COLUMNS.items()}
        for schema in ROW_FILES.values():
            rows |= {field.name: field.type for field in schema}
        for name in keep:
            rows |= {f"{name}.keys": pa.list_(pa.uint64()), f"{name}.sizes": pa.list_(pa.int32())}
        pictures = PICTURE_SCHEMA.append(pa.field("faulty", pa.bool_()))
        return {"rows": pa.schema(rows), "faults": pa.schema({"fault": pa.string()}), "pictures": pictures}

    @classmethod
    def of(
        cls, keep: Sequence[str], rows: list[dict[str, Any]], faults: list[str], pictures: dict[tuple[Any, ...], bool]
    ) -> Part:
        """Make a part of Python's values; `pictures` says of each whether it is faulty."""
        schemas = cls.schemas(keep)
        seen = [dict(zip(schemas["pictures"].names, (*one, pictures[one]), strict=True)) for one in sorted(pictures)]
        values = {"rows": rows, "faults": [{"fault": line} for line in faults], "pictures": seen}
        return cls(**{name: pa.Table.from_pylist(values[name], schemas[name]) for name in cls._fields})

    @property
    def records(self) -> int:
        """How many there were; those without the format have a fault and no row."""
        without_tokens = len(self.rows) - np.count_nonzero(self.rows["tokens"].to_numpy())
        return len(self.rows) + len(self.faults) - int(without_tokens)


def fault_line(fault: Fault, file: int) -> str:
    """Return a line of faults.jsonl."""
    return json.dumps([file, fault.line, fault.field, fault.what, fault.how])


def write_part(place: Path, part: Part) -> None:
    """Write a part, whole or not at all."""
    content = io.BytesIO()
    for table in part:
        with pa.ipc.new_stream(content, table.schema) as stream:
            stream.write_table(table)
    body = content.getvalue()
    # The check comes last: Arrow reads from aligned places.
    write_new(place, body + zlib.crc32(body).to_bytes(CRC_BYTES, "big"))


def read_part(place: Path) -> Part | None:
    """Read a part; None where there is none, or a damaged one."""
    try:
        content = memoryview(place.read_bytes())
    except FileNotFoundError:
        return None
    body, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
    if zlib.crc32(body).to_bytes(CRC_BYTES, "big") != crc:
        return None
    source = pa.BufferReader(body)
    return Part(*(pa.ipc.open_stream(source).read_all() for _ in Part._fields))


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
        finder = RememberingFinder(encoder.finder.folders, encoder.finder.within)
        self.encoders = BesideEach(replace(encoder, finder=finder), plan.files, self.pictures)

    def __getitem__(self, number: int) -> UserError | None:
        place = self.plan.parts / str(number)
        # Another run may have put the index together meanwhile, and removed its parts.
        if place.exists() or (self.plan.place / HEADER).exists():
            return None
        file = self.plan.pieces[number].file
        try:
            part = self.encode(number)
            # The folder of parts belongs to the records as they were hashed.
            sources.check_unchanged([self.plan.files[file]], [self.plan.stamps[file]])
            with writable(self.cache):
                write_part(place, part)
        except UserError as error:
            return error
        return None

    def read(self, number: int, check_images: bool) -> Part:
        """Return the part of a piece, made anew where it is gone, damaged, or of images that have changed.

        Args:
            check_images: all images are looked at, not only those of records with a fault.
        """
        part = read_part(self.plan.parts / str(number))
        if part is not None:
            looked = part.pictures if check_images else part.pictures.filter(part.pictures["faulty"])
            if not changed(seen_in(looked), self.encoder.finder, self.plan.files, self.pictures):
                return part
        return self.encode(number)

    def encode(self, number: int) -> Part:
        """Read, check and encode the records of a piece.

        Raises:
            UserError: its file cannot be read, or the cache not written.
        """
        piece = self.plan.pieces[number]
        # Those of one folder see the same images.
        first = self.first[self.plan.files[piece.file].parent]
        encoder = self.encoders[first]
        rows: list[dict[str, Any]] = []
        faults: list[str] = []
        pictures: dict[tuple[Any, ...], bool] = {}
        for found in read_piece(piece, self.plan.files[piece.file], self.pictures):
            if isinstance(found, Fault):
                faults.append(fault_line(found, piece.file))
                continue
            row, fault = encode_row(found, encoder, self.keep)
            rows.append(row | {"file": piece.file})
            if fault is not None:
                faults.append(fault_line(fault, piece.file))
            for _, path in found.images(helpers=encoder.stage == "stage1"):
                seen = (first, path, *encoder.finder.sight(path))
                pictures[seen] = pictures.get(seen, False) or fault is not None
        return Part.of(self.keep, rows, faults, pictures)


def encode_row(record: Record, encoder: Encoder, keep: Sequence[str]) -> tuple[dict[str, Any], Fault | None]:
    """Encode a record and check its images; return its row of a Part without the file, and its fault.

    The row of a record with a fault holds nothing but the record.
    """
    fault, layout, measure = None, Layout([], 0, [], []), NO_MEASURE
    keys: dict[str, list[Key]] = {name: [] for name in keep}
    try:
        own = encoder.lay_out(record)
        for name, path in record.images(helpers=encoder.stage == "stage1"):
            if name in keep:
                keys[name].append(encoder.finder.key(record, name, path))
            else:
                encoder.finder.check(record, name, path)
        layout, measure = own, encoder.measure_of(own)
    except RecordError as error:
        fault, keys = error.fault, {name: [] for name in keep}
    sizes = {"image_input": measure.images, "image_output": measure.helpers}
    text = to_json(record)
    ids, rest = written(layout, record)
    row = dict(
        line=record.line,
        tokens=measure.tokens,
        labels=measure.labels,
        runs=measure.runs,
        patches=sum(time * height * width for time, height, width in layout.grids + layout.helper_grids),
        record_check=check_of(text),
        check=check_of(rest, ids),
        ids=ids,
        layout=rest,
        record=text,
        **{f"{name}.keys": [half for key in keys[name] for half in key] for name in keep},
        **{f"{name}.sizes": sizes[name] for name in keep},
    )
    return row, fault
