"""The index of a records source on disk: every row measured and encoded once, opened again in a second by all runs.

R rows, I images of a field, T tokens of a row.

    <cache>/index/<key>/index.json      what the other files are, their sizes and checksums
                        <column>.bin    numbers of each row or image, memory-mapped
                        records.arrow   the records as the user wrote them, BATCH_ROWS a batch
                        rows.arrow      the rows as one stage encodes them, in the same batches
                        faults.arrow    what is wrong with the records that cannot be used
                        pictures.arrow  the image files that were looked at, with their sizes and times
                        suspects.arrow  those of them that records with a fault name

The key is a hash of what a row is a function of: the records, the tokenizer, the image processors' settings, the stage,
k, where images are looked for. A folder is put together from parts (parts.py) under another name, renamed when it is
whole, and never changed.
Columns are small and mapped. Rows are read by their place in the file: pages of a map that one process alone has
touched count as its own memory, and a run touches every row in every epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import ImageKeys
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Fault, Record
from mirage_ds.data.sample import Grid, Layout
from mirage_ds.data.sources import name_file
from mirage_ds.errors import UserError

# Raised whenever the files of an index mean something else than before.
FORMAT = 2
HEADER = "index.json"
# Paths of images that a run has met a fault of, one JSON string a line; no part of the index itself.
DOUBTS = "doubts.jsonl"
# A row costs one read of its batch: few rows are quick to read, and many make less of what Arrow writes beside them.
BATCH_ROWS = 16
# Numbers of each row: places, counts, and the CRC-32 of its record and of its encoded form.
COLUMNS = {
    "line": np.int64,
    "file": np.int32,
    "tokens": np.int32,
    "labels": np.int32,
    "runs": np.int32,
    "patches": np.int64,
    "record_check": np.uint32,
    "check": np.uint32,
}
STRINGS, NUMBERS = pa.list_(pa.string()), pa.list_(pa.int32())
RECORD_SCHEMA = pa.schema(
    [
        *(("line", pa.int64()), ("text_input", pa.string()), ("text_output", pa.string())),
        *(("image_input", STRINGS), ("image_output", STRINGS), ("extra", pa.string())),
    ]
)
ROW_SCHEMA = pa.schema(
    [
        *(("input_ids", NUMBERS), ("answer_start", pa.int32()), ("grids", NUMBERS), ("helper_grids", NUMBERS)),
        *(("image_input", STRINGS), ("image_output", STRINGS)),
    ]
)
# row: −1 for a record without the format, which has no row.
FAULT_SCHEMA = pa.schema(
    [
        *(("row", pa.int64()), ("file", pa.int32()), ("line", pa.int64())),
        *(("field", pa.string()), ("what", pa.string()), ("how", pa.string())),
    ]
)
# file: of those in one folder the first; it says beside which folder the path is looked for.
PICTURE_SCHEMA = pa.schema(
    [
        *(("file", pa.int32()), ("path", pa.string()), ("place", pa.int32())),
        *(("bytes", pa.int64()), ("mtime_ns", pa.int64())),
    ]
)
PICTURE_BATCH = 4096
# A network file system answers many questions at once.
LOOKING_THREADS = 16


class DamagedError(Exception):
    """An index that is not whole; it is made anew."""


class Sight(NamedTuple):
    """Where an image was found, as its number in ImageFinder.places, and its file's size and time; −1 if nowhere."""

    place: int
    bytes: int
    mtime_ns: int


def sight(finder: ImageFinder, path: str) -> Sight:
    """Look for an image as ImageFinder.find does, reading nothing."""
    for number, place in enumerate(finder.places(path)):
        try:
            found = os.stat(place)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(found.st_mode):
            return Sight(number, found.st_size, found.st_mtime_ns)
    return Sight(-1, -1, -1)


def changed(pictures: pa.Table | pa.RecordBatch, finder: ImageFinder, files: Sequence[Path], inside: Path) -> bool:
    """Tell whether an image is another file now than in a table of PICTURE_SCHEMA, or lies elsewhere; reads none.

    Args:
        finder: of the records, for any of their files.
        inside: where pictures that came inside records files lie.
    """
    finders: dict[int, ImageFinder] = {}
    for first, path, *seen in zip(*(pictures[name].to_pylist() for name in PICTURE_SCHEMA.names), strict=True):
        if first not in finders:
            finders[first] = finder.of(files[first], inside)
        if sight(finders[first], path) != Sight(*seen):
            return True
    return False


def layout_check(layout: Layout, record: Record) -> int:
    """CRC-32 of an encoded row."""
    ids = np.asarray(layout.input_ids, dtype=np.int32).tobytes()
    rest = [layout.answer_start, layout.grids, layout.helper_grids, record.image_input, record.image_output]
    return zlib.crc32(json.dumps(rest).encode(), zlib.crc32(ids))


def record_check(row: dict[str, Any]) -> int:
    """CRC-32 of a record as an Arrow row."""
    return zlib.crc32(json.dumps([row[name] for name in RECORD_SCHEMA.names]).encode())


def crc_of(file: Path) -> int:
    """CRC-32 of a file's content, read in blocks."""
    crc = 0
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _grids(flat: list[int]) -> list[Grid]:
    return [(flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3)]


def _reader(file: Path) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(pa.OSFile(str(file)))


class EncodedRows:
    """An index, opened. It crosses process borders as a path.

    Args:
        place: the index's folder.
        files: the records files.
        pictures: where pictures that came inside records files lie.

    Attributes:
        digest: hash of all that the rows hold; the same wherever the same rows were indexed.
        source: hash of the records (sources.data_hash).
        records: how many the source holds, whether or not they have the format.
        faults: how many of them cannot be used.

    Raises:
        DamagedError: it is not there, or not whole.
    """

    def __init__(self, place: Path, files: Sequence[Path], pictures: Path):
        self.place, self.files, self.pictures = place, tuple(files), pictures
        self._open()
        for name, (size, crc) in self._header["files"].items():
            file = place / name
            try:
                whole = file.stat().st_size == size and (crc is None or crc_of(file) == crc)
            except OSError:
                whole = False
            if not whole:
                raise DamagedError(file)

    def _open(self) -> None:
        try:
            header = json.loads((self.place / HEADER).read_bytes())
            if digest_of(header) != header["digest"]:
                raise DamagedError(self.place)
            self._header: dict[str, Any] = header
            self.digest, self.source = str(header["digest"]), str(header["source"])
            self.records, self.faults = int(header["records"]), int(header["faults"])
            self._columns = {name: self._column(name, *kind) for name, kind in header["columns"].items()}
            # Opened here: a data-loader process that is forked later reads the same files, whatever lies there then.
            self._readers = {name: _reader(self.place / name) for name in ("records.arrow", "rows.arrow")}
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DamagedError(self.place) from error

    def _column(self, name: str, dtype: str, shape: list[int]) -> np.ndarray:
        if not shape[0]:
            # An empty file cannot be mapped.
            return np.empty(shape, dtype=dtype)
        return np.memmap(self.place / f"{name}.bin", dtype=dtype, mode="r", shape=tuple(shape)).view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "files": self.files, "pictures": self.pictures, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.place, self.files, self.pictures = state["place"], state["files"], state["pictures"]
        try:
            self._open()
        except DamagedError:
            raise self._lost() from None
        if self.digest != state["digest"]:
            raise self._lost()

    def _lost(self) -> UserError:
        return UserError(
            f"{self.place}: the index of the records is damaged or another one; start again, which makes it anew",
            everywhere=False,
        )

    def _damaged(self) -> UserError:
        # Without its header it is no index: the next start makes it anew.
        (self.place / HEADER).unlink(missing_ok=True)
        return self._lost()

    def __len__(self) -> int:
        return len(self._columns["line"])

    def __bool__(self) -> bool:
        # An index of faults alone is one too.
        return True

    @overload
    def __getitem__(self, what: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, what: str) -> np.ndarray: ...
    def __getitem__(self, what: int | str) -> dict[str, Any] | np.ndarray:
        """Return a column (COLUMNS), (R,), or a row's record in the form that record.record_of takes.

        Raises:
            UserError: the row is damaged; only this process knows.
        """
        if isinstance(what, str):
            return self._columns[what]
        found: dict[str, Any] = self._read("records.arrow", what).to_pylist()[0]
        if record_check(found) != self._columns["record_check"][what]:
            raise self._damaged()
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def _read(self, name: str, row: int) -> pa.RecordBatch:
        starts = self._columns["batch"]
        number = int(np.searchsorted(starts, row, side="right")) - 1
        try:
            return self._readers[name].get_batch(number).slice(row - int(starts[number]), 1)
        except (OSError, pa.ArrowException):
            raise self._damaged() from None

    def encoded(self, row: int) -> tuple[Record, Layout]:
        """Return a row's record without its texts, and where everything in it stands.

        Raises:
            UserError: the row is damaged; only this process knows.
        """
        found = self._read("rows.arrow", row)
        ids = found["input_ids"][0].values.to_numpy()
        rest = found.select(ROW_SCHEMA.names[1:]).to_pylist()[0]
        layout = Layout(ids, rest["answer_start"], _grids(rest["grids"]), _grids(rest["helper_grids"]))
        line = int(self._columns["line"][row])
        record = Record(line, "", "", tuple(rest["image_input"]), tuple(rest["image_output"]))
        if layout_check(layout, record) != self._columns["check"][row]:
            raise self._damaged()
        return record, layout

    def same_as(self, other: EncodedRows) -> bool:
        """Tell whether two indices are one and the same to the byte."""
        return bool(self._header == other._header)

    def images(self, name: str) -> ImageKeys:
        """Return the images of a field whose features are kept."""
        return ImageKeys(*(self._columns[f"{name}.{part}"] for part in ("keys", "sizes", "starts")))

    def named(self, fault: Fault, row: int) -> Fault:
        """Put a row's file into its fault, where there are several; the next start looks at the row's images."""
        record, _ = self.encoded(row)
        paths = (*record.image_input, *record.image_output)
        # A cache that cannot be written: --check_images finds it.
        with suppress(OSError), (self.place / DOUBTS).open("a") as file:
            file.write("".join(f"{json.dumps(path)}\n" for path in paths))
        if str(self.pictures.resolve()) in fault.what:
            fault = replace(fault, how="start the run again, which writes it anew")
        return name_file(fault, self.files, int(self._columns["file"][row]))

    def all_faults(self) -> Iterator[Fault]:
        """Yield the fault of each record that cannot be used, in the order of the records."""
        reader = _reader(self.place / "faults.arrow")
        for number in range(reader.num_record_batches):
            for row in reader.get_batch(number).to_pylist():
                yield name_file(Fault(row["line"], row["field"], row["what"], row["how"]), self.files, row["file"])

    def pictures_changed(self, finder: ImageFinder, every: bool) -> bool:
        """Tell whether an image that was looked at is another file now, or lies elsewhere; reads no image.

        Args:
            finder: of the records, for any of their files.
            every: all images are looked at; else only those of records with a fault, which somebody may have corrected,
                be it that a run has met it.
        """
        known_from = self._header["working_directory"]
        if known_from is not None and known_from != str(finder.folders[-1]):
            return True
        if self._header["inside"] and not self.pictures.is_dir():
            return True
        file = self.place / ("pictures.arrow" if every else "suspects.arrow")
        if not every and (self.place / DOUBTS).exists():
            lines = (self.place / DOUBTS).read_text().splitlines()
            doubted = pa.array({json.loads(line) for line in lines}, pa.string())
            seen = _reader(self.place / "pictures.arrow").read_all()
            if changed(seen.filter(pc.is_in(seen["path"], doubted)), finder, self.files, self.pictures):
                return True

        def other(number: int) -> bool:
            return changed(_reader(file).get_batch(number), finder, self.files, self.pictures)

        with ThreadPoolExecutor(LOOKING_THREADS) as pool:
            return any(pool.map(other, range(_reader(file).num_record_batches)))


class BesideEach:
    """An encoder for each row: the rows of several files look for images beside their own."""

    def __init__(self, encoder: Encoder, rows: EncodedRows):
        self.encoder, self.rows = encoder, rows
        self._made: dict[int, Encoder] = {}

    def __getitem__(self, row: int) -> Encoder:
        number = int(self.rows["file"][row])
        if number not in self._made:
            finder = self.encoder.finder.of(self.rows.files[number], self.rows.pictures)
            same = finder == self.encoder.finder
            self._made[number] = self.encoder if same else replace(self.encoder, finder=finder)
        return self._made[number]


def digest_of(header: dict[str, Any]) -> str:
    """Hash of what the rows hold, which is all in the columns and the faults."""
    own = {name: both for name, both in header["files"].items() if name.endswith(".bin") or name == "faults.arrow"}
    return hashlib.sha256(json.dumps([header["columns"], own], sort_keys=True).encode()).hexdigest()
