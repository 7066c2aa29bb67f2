"""The index of a records source on disk: every row measured and encoded once, opened again in a second by all runs.

R records, I images of a field, T tokens of a row.

    <cache>/index/<key>/index.json      size and checksum of the other files
                        columns.arrow   numbers of each record (NUMBERS), and the images of each field whose features
                                        are kept; mapped
                        rows.arrow      the records as the user wrote them and as one stage encodes them, or what is
                                        wrong with those that cannot be used; BATCH_ROWS a batch
                        pictures.arrow  the image files that were looked at, with their sizes and times

The key is a hash of what a row is a function of: the records, the tokenizer, the image processors' settings, the stage,
k, where images are looked for. make_index.py makes a folder under another name and renames it when it is whole; then it
never changes. Columns are small and mapped. Rows are read by their place in the file: pages of a map that one process
alone has touched count as its own memory, and a run touches every row in every epoch.

`datasets` has a map with processes, and it was measured (2026-11): a killed one starts again from the first row, its
files differ with the number of processes, it knows one host, and reading its rows grows each process by their size.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
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

# Raised whenever the files of an index mean something else than before.
FORMAT = 4
HEADER = "index.json"
# Paths of images that a run has met a fault of, one JSON string a line; no part of the index itself.
DOUBTS = "doubts.jsonl"
# A row costs one read of its batch: few rows are quick to read, and many make less of what Arrow writes beside them.
BATCH_ROWS = 16
# Places, counts, and the CRC-32 of the rest (check_of). A record that cannot be used has no tokens.
NUMBERS = pa.schema(
    {
        "line": pa.int64(),
        "file": pa.int32(),
        "tokens": pa.int32(),
        "labels": pa.int32(),
        "runs": pa.int32(),
        "patches": pa.int64(),
        "check": pa.uint32(),
    }
)
# layout: what a Layout holds besides its ids, or a Fault; both this and the record in JSON.
ROWS = pa.schema({"ids": pa.list_(pa.int32()), "layout": pa.string(), "record": pa.string()})
# A field's images: key of the content, merged features.
IMAGES = pa.list_(pa.struct({"key": pa.list_(pa.uint64(), 2), "size": pa.int32()}))
# file: of those in one folder the first; it says beside which folder the path is looked for. The rest is a Sight.
PICTURES = pa.schema(
    {"file": pa.int32(), "path": pa.string(), "place": pa.int32(), "bytes": pa.int64(), "mtime_ns": pa.int64()}
)


class DamagedError(Exception):
    """An index that is not whole; it is made anew."""


def check_of(ids: np.ndarray, layout: str, record: str) -> int:
    """CRC-32 of a row of ROWS; ids: (T,) int32."""
    return zlib.crc32(record.encode(), zlib.crc32(layout.encode(), zlib.crc32(ids.tobytes())))


def hash_of(file: Path) -> str:
    """Hash of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class Index:
    """An index, opened. It crosses process borders as a path.

    Args:
        place: the index's folder.
        files: the records files.
        pictures: where pictures that came inside records files lie.

    Attributes:
        header: what index.json holds.
        faults: how many of the records cannot be used.

    Raises:
        DamagedError: it is not there, or not whole.
    """

    def __init__(self, place: Path, files: Sequence[Path], pictures: Path):
        self.place, self.files, self.pictures = place, tuple(files), pictures
        self._open(check=True)

    def _open(self, check: bool) -> None:
        try:
            self.header: dict[str, Any] = json.loads((self.place / HEADER).read_bytes())
            for name, (size, digest) in self.header["files"].items() if check else ():
                file = self.place / name
                if file.stat().st_size != size or digest not in (None, hash_of(file)):
                    raise DamagedError(file)
            self._columns = self.reader("columns.arrow", mapped=True).get_batch(0)
            # Opened here: a data-loader process that is forked later reads the same file, whatever lies there then.
            self._rows = self.reader("rows.arrow")
            self.numbers = {name: self._columns[name].to_numpy() for name in NUMBERS.names}
            self.faults = len(self) - int(np.count_nonzero(self["tokens"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DamagedError(self.place) from error

    def reader(self, name: str, mapped: bool = False) -> pa.RecordBatchFileReader:
        """Open one of the index's tables."""
        open_file = pa.memory_map if mapped else pa.OSFile
        return pa.ipc.open_file(open_file(str(self.place / name)))

    @property
    def source(self) -> str:
        """Hash of the records (sources.data_hash)."""
        return str(self.header["source"])

    @property
    def digest(self) -> str:
        """Hash of all that the rows hold; the same wherever the same rows were indexed."""
        return str(self.header["files"]["columns.arrow"][1])

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "files": self.files, "pictures": self.pictures, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.place, self.files, self.pictures = state["place"], state["files"], state["pictures"]
        try:
            self._open(check=False)
        except DamagedError:
            raise self._lost() from None
        if self.digest != state["digest"]:
            raise self._lost()

    def _lost(self) -> UserError:
        return UserError(
            f"{self.place}: the index of the records is damaged or another one; start again, which makes it anew",
            everywhere=False,
        )

    def __len__(self) -> int:
        """How many records the source holds, whether or not they can be used."""
        return len(self["line"])

    def __getitem__(self, column: str) -> np.ndarray:
        """Return a column of NUMBERS, (R,)."""
        return self.numbers[column]

    def _read(self, row: int) -> tuple[np.ndarray, str, str]:
        """Return a row of ROWS."""
        number, at = divmod(row, BATCH_ROWS)
        try:
            batch = self._rows.get_batch(number).slice(at, 1)
            # A bit that has rotted may be anywhere: in an offset, or in half a character.
            batch.validate(full=True)
            found = batch["ids"][0].values.to_numpy(), batch["layout"][0].as_py(), batch["record"][0].as_py()
            if check_of(*found) == self["check"][row]:
                return found
        except (OSError, ValueError, pa.ArrowException):
            pass
        # Without its header it is no index: the next start makes it anew.
        (self.place / HEADER).unlink(missing_ok=True)
        raise self._lost()

    def encoded(self, row: int) -> tuple[Record, Layout]:
        """Return a row's record as the user wrote it, and where everything in it stands.

        Raises:
            UserError: the row is damaged; only this process knows.
        """
        ids, layout, record = self._read(row)
        answer_start, grids, helper_grids = json.loads(layout)
        return from_json(record), Layout(ids, answer_start, [*map(tuple, grids)], [*map(tuple, helper_grids)])

    def record(self, row: int) -> Record:
        """Return a row's record; see encoded."""
        return self.encoded(row)[0]

    def places_of(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Say where rows were read from, as row, file and line."""
        files = [str(file) for file in self.files]
        return [{"row": row, "file": files[self["file"][row]], "line": int(self["line"][row])} for row in rows]

    def images(self, name: str) -> ImageKeys:
        """Return the images of a field whose features are kept."""
        own = self._columns[name]
        keys = own.values.field("key").values.to_numpy().reshape(-1, 2)
        return ImageKeys(keys, own.values.field("size").to_numpy(), own.offsets.to_numpy())

    def named(self, fault: Fault, row: int) -> Fault:
        """Put a row's file into its fault, where there are several; the next start looks at the row's images."""
        record = self.record(row)
        paths = (*record.image_input, *record.image_output)
        # A cache that cannot be written: --check_images finds it.
        with suppress(OSError), (self.place / DOUBTS).open("a") as file:
            file.write("".join(f"{json.dumps(path)}\n" for path in paths))
        if str(self.pictures.resolve()) in fault.what:
            fault = replace(fault, how="start the run again, which writes it anew")
        return name_file(fault, self.files, int(self["file"][row]))

    def all_faults(self) -> Iterator[Fault]:
        """Yield the fault of each record that cannot be used, in the order of the records."""
        for row in np.flatnonzero(self["tokens"] == 0).tolist():
            fault = Fault(**json.loads(self._read(row)[1]))
            yield name_file(fault, self.files, int(self["file"][row]))


def open_made(place: Path, files: Sequence[Path], cache: Path) -> Index | None:
    """Open an index; None where there is none, or a damaged one."""
    try:
        return Index(place, files, folder_of_pictures(cache))
    except DamagedError:
        return None
