"""The index of a records source on disk: every row measured and encoded once, opened again in a second by all runs.

R rows, I images of a field, T tokens of a row.

    <cache>/index/<key>/index.json      size and checksum of the other files
                        <column>.npy    (R,) a number of each row (COLUMNS), memory-mapped
                        <field>.*.npy   the images of a field whose features are kept (ImageKeys)
                        rows.arrow      the rows as one stage encodes them, BATCH_ROWS a batch
                        records.arrow   the records as the user wrote them, in the same batches
                        faults.jsonl    what is wrong with the records that cannot be used
                        pictures.arrow  the image files that were looked at, with their sizes and times
                        suspects.arrow  those of them that records with a fault name

The key is a hash of what a row is a function of: the records, the tokenizer, the image processors' settings, the stage,
k, where images are looked for. make_index.py makes a folder under another name and renames it when it is whole; then it
never changes. Columns are small and mapped. Rows are read by their place in the file: pages of a map that one process
alone has touched count as its own memory, and a run touches every row in every epoch.

`datasets` has a map with processes, and it was measured (2026-11): a killed one starts again from the first row, its
files differ with the number of processes, it knows one host, and reading its rows grows each process by their size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mirage_ds.data.inside import folder_of_pictures
from mirage_ds.data.record import Fault, Record, from_json, name_file
from mirage_ds.data.sample import ImageKeys, Layout
from mirage_ds.errors import UserError
from mirage_ds.files import sync

# Raised whenever the files of an index mean something else than before.
FORMAT = 3
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
# In JSON: what a Layout holds besides its ids with the paths of the images, and the record.
ROW_FILES = {
    "rows.arrow": pa.schema({"ids": pa.list_(pa.int32()), "layout": pa.string()}),
    "records.arrow": pa.schema({"record": pa.string()}),
}
# file: of those in one folder the first; it says beside which folder the path is looked for.
PICTURE_SCHEMA = pa.schema(
    {"file": pa.int32(), "path": pa.string(), "place": pa.int32(), "bytes": pa.int64(), "mtime_ns": pa.int64()}
)
PICTURE_BATCH = 4096
# What a killed run has left behind is removed by a later one, that no longer takes it for another's work in progress.
ABANDONED_S = 7 * 24 * 3600.0


class DamagedError(Exception):
    """An index that is not whole; it is made anew."""


def check_of(content: str, ids: np.ndarray | None = None) -> int:
    """CRC-32 of a row: of a record or of a layout and its token ids (T,) int32."""
    return zlib.crc32(content.encode(), 0 if ids is None else zlib.crc32(ids.tobytes()))


def written(layout: Layout, record: Record) -> tuple[np.ndarray, str]:
    """Return an encoded row as it is stored: its ids and the rest."""
    rest = [layout.answer_start, layout.grids, layout.helper_grids, record.image_input, record.image_output]
    return np.asarray(layout.input_ids, dtype=np.int32), json.dumps(rest)


def seen_in(pictures: pa.Table | pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table that begins with PICTURE_SCHEMA."""
    return zip(*(pictures[name].to_pylist() for name in PICTURE_SCHEMA.names), strict=True)


def hash_of(file: Path) -> str:
    """Hash of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of(header: dict[str, Any]) -> str:
    """Hash of what the rows hold, which is all in the columns and the faults."""
    own = {name: both for name, both in header["files"].items() if name.endswith((".npy", ".jsonl"))}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


class Index:
    """An index, opened. It crosses process borders as a path.

    Args:
        place: the index's folder.
        files: the records files.
        pictures: where pictures that came inside records files lie.

    Attributes:
        header: what index.json holds.
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
        for name, (size, digest) in self.header["files"].items():
            file = place / name
            try:
                whole = file.stat().st_size == size and digest in (None, hash_of(file))
            except OSError:
                whole = False
            if not whole:
                raise DamagedError(file)

    def _open(self) -> None:
        try:
            self.header: dict[str, Any] = json.loads((self.place / HEADER).read_bytes())
            self.digest, self.source = str(self.header["digest"]), str(self.header["source"])
            if digest_of(self.header) != self.digest:
                raise DamagedError(self.place)
            self.records, self.faults = int(self.header["records"]), int(self.header["faults"])
            names = [name.removesuffix(".npy") for name in self.header["files"] if name.endswith(".npy")]
            # A plain view: numpy's own class of maps makes every look at a number slow.
            self._columns = {
                name: np.load(self.place / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names
            }
            # Opened here: a data-loader process that is forked later reads the same files, whatever lies there then.
            self._readers = {name: pa.ipc.open_file(pa.OSFile(str(self.place / name))) for name in ROW_FILES}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, pa.ArrowException) as error:
            raise DamagedError(self.place) from error

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

    def __getitem__(self, column: str) -> np.ndarray:
        """Return a column (COLUMNS), (R,)."""
        return self._columns[column]

    def record(self, row: int) -> Record:
        """Return a row's record, as the user wrote it.

        Raises:
            UserError: the row is damaged; only this process knows.
        """
        text: str = self._read("records.arrow", row)["record"][0].as_py()
        if check_of(text) != self._columns["record_check"][row]:
            raise self._damaged()
        return from_json(text)

    def _read(self, name: str, row: int) -> pa.RecordBatch:
        number, at = divmod(row, BATCH_ROWS)
        try:
            found = self._readers[name].get_batch(number).slice(at, 1)
            # A bit that has rotted may be anywhere: in an offset, or in half a character.
            found.validate(full=True)
        except (OSError, ValueError, pa.ArrowException):
            raise self._damaged() from None
        return found

    def encoded(self, row: int) -> tuple[Record, Layout]:
        """Return a row's record without its texts, and where everything in it stands.

        Raises:
            UserError: the row is damaged; only this process knows.
        """
        found = self._read("rows.arrow", row)
        ids, text = found["ids"][0].values.to_numpy(), found["layout"][0].as_py()
        if check_of(text, ids) != self._columns["check"][row]:
            raise self._damaged()
        answer_start, grids, helper_grids, images, helpers = json.loads(text)
        record = Record(int(self._columns["line"][row]), "", "", tuple(images), tuple(helpers))
        return record, Layout(ids, answer_start, [*map(tuple, grids)], [*map(tuple, helper_grids)])

    def images(self, name: str) -> ImageKeys:
        """Return the images of a field whose features are kept."""
        return ImageKeys(*(self._columns[f"{name}.{part}"] for part in ImageKeys._fields))

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
        with (self.place / "faults.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                number, *rest = json.loads(line)
                yield name_file(Fault(*rest), self.files, number)

    def seen(self, name: str) -> pa.RecordBatchFileReader:
        """Open "pictures.arrow" or "suspects.arrow"."""
        return pa.ipc.open_file(pa.OSFile(str(self.place / name)))


def open_made(place: Path, files: Sequence[Path], cache: Path) -> Index | None:
    """Open an index; None where there is none, or a damaged one."""
    try:
        return Index(place, files, folder_of_pictures(cache))
    except DamagedError:
        return None


def put(own: Index, place: Path, cache: Path) -> Index:
    """Rename a whole index to its place, and return it opened.

    What lies there is damaged or old, or another run has just made the same: then that one stays.
    """
    partial = own.place
    while True:
        theirs = open_made(place, own.files, cache)
        if theirs is not None and theirs.header == own.header:
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


def remove_abandoned(folder: Path) -> None:
    """Remove what lies under a name of work in progress and has not been touched for long."""
    for left in folder.glob(".*"):
        try:
            old = time.time() - left.stat().st_mtime > ABANDONED_S
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)
