"""The index of a records source on disk: every row measured and encoded once, opened again in a second by all runs.

R records, I images of a field, T tokens of a row.

    <cache>/index/<key>/index.json      what tells that the other files are whole (mark_of)
                        columns.arrow   numbers of each record (NUMBERS), and the images of each field whose features
                                        are kept; mapped
                        rows.bin        of each record its tokens (int32), then in JSON a line of what else is in its
                                        Layout and a line of it as the user wrote it; or what is wrong with it
                        pictures.arrow  the image files that each record shows, with their sizes and times

The key is a hash of what a row is a function of: the records, the tokenizer, the image processors' settings, the stage,
k, where images are looked for. make_index.py makes a folder under another name and renames it when it is whole; then it
never changes. Columns are small and mapped. Rows are read by their place in the file: pages of a map that one process
alone has touched count as its own memory, and a run touches every row in every epoch.

`datasets` has a map with processes, and it was measured (2026-11): a killed one starts again from the first row, its
files differ with the number of processes, it knows one host, and reading its rows grows each process by their size.
"""

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
from mirage_ds.data.record import FIELDS, Fault, Record, from_json, name_file
from mirage_ds.data.sample import ImageKeys, Layout
from mirage_ds.data.sources import hash_of
from mirage_ds.errors import UserError

# Raised whenever the files of an index mean something else than before.
FORMAT = 6
HEADER = "index.json"
# Rows in which a run has met a fault, one a line; no part of the index itself.
DOUBTS = "doubts.txt"
# Places, counts, and the length and CRC-32 of what rows.bin has of it. A record that cannot be used has no tokens.
NUMBERS = pa.schema(
    [(name, pa.int64()) for name in ("line", "patches", "bytes")]
    + [(name, pa.int32()) for name in ("file", "tokens", "labels", "runs", "latents")]
    + [("check", pa.uint32())]
)
# A field's images: key of the content, merged features.
IMAGES = pa.list_(pa.struct({"key": pa.list_(pa.uint64(), 2), "size": pa.int32()}))


class DamagedError(Exception):
    """An index that is not whole; it is made anew."""


def mark_of(file: Path) -> int | str:
    """Return what tells that a file of an index is whole: its hash; of the rows, that each have a check, the size."""
    return file.stat().st_size if file.name == "rows.bin" else hash_of(file)


class Index:
    """An index, opened. It crosses process borders as a path.

    Args:
        place: the index's folder.
        files: the records files.
        pictures: where pictures that came inside records files lie.

    Attributes:
        header: what index.json holds.
        source: hash of the records (sources.data_hash).
        digest: hash of all that the rows hold; the same wherever the same rows were indexed.
        faults: how many of the records cannot be used.
        images: field name → the images of all rows, usable or not, for the fields whose features are kept.

    Raises:
        DamagedError: it is not there, or not whole.
    """

    def __init__(self, place: Path, files: Sequence[Path], pictures: Path):
        self.place, self.files, self.pictures = place, tuple(files), pictures
        self._open(check=True)

    def _open(self, check: bool) -> None:
        try:
            self.header: dict[str, Any] = json.loads((self.place / HEADER).read_bytes())
            for name, mark in self.header["files"].items() if check else ():
                if mark_of(self.place / name) != mark:
                    raise DamagedError(self.place / name)
            self.source = str(self.header["source"])
            self.digest = str(self.header["files"]["columns.arrow"])
            columns = self.reader("columns.arrow").get_batch(0)
            # Opened here: a data-loader process that is forked later reads the same file, whatever lies there then.
            self._rows = pa.OSFile(str(self.place / "rows.bin"))
            self.numbers = {name: columns[name].to_numpy() for name in (*NUMBERS.names, "start")}
            self.images = {name: _images(columns[name]) for name in columns.schema.names if name in FIELDS}
            self.faults = len(self) - int(np.count_nonzero(self["tokens"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DamagedError(self.place) from error

    def reader(self, name: str) -> pa.RecordBatchFileReader:
        """Map one of the index's tables."""
        return pa.ipc.open_file(pa.memory_map(str(self.place / name)))

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "files": self.files, "pictures": self.pictures, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.place, self.files, self.pictures = state["place"], state["files"], state["pictures"]
        with suppress(DamagedError):
            self._open(check=False)
            if self.digest == state["digest"]:
                return
        raise self._lost()

    def _lost(self) -> UserError:
        what = "the index of the records is damaged or another one; start again, which makes it anew"
        return UserError(f"{self.place}: {what}", everywhere=False)

    def __len__(self) -> int:
        """How many records the source holds, whether or not they can be used."""
        return len(self["line"])

    def __getitem__(self, column: str) -> np.ndarray:
        """Return a column of NUMBERS, or where each row begins in rows.bin ("start"), (R,)."""
        return self.numbers[column]

    def _read(self, row: int) -> tuple[np.ndarray, list[str]]:
        """Return a row's tokens, (T,) int32, and the lines behind them."""
        # A disk that fails is as bad as one that forgets.
        with suppress(OSError):
            content = self._rows.read_at(int(self["bytes"][row]), int(self["start"][row]))
            if zlib.crc32(content) == self["check"][row]:
                ids = np.frombuffer(content, np.int32, self["tokens"][row])
                return ids, content[ids.nbytes :].decode().split("\n")
        # Without its header it is no index: the next start makes it anew.
        (self.place / HEADER).unlink(missing_ok=True)
        raise self._lost()

    def encoded(self, row: int) -> tuple[Record, Layout]:
        """Return a row's record as the user wrote it, and where everything in it stands.

        Raises:
            UserError: the row is damaged; only this process knows.
        """
        ids, (layout, record) = self._read(row)
        answer_start, grids, helper_grids, region = json.loads(layout)
        grids, helper_grids = ([*map(tuple, own)] for own in (grids, helper_grids))
        return from_json(record), Layout(ids, answer_start, grids, helper_grids, region)

    def record(self, row: int) -> Record:
        """Return a row's record; see encoded."""
        return self.encoded(row)[0]

    def places_of(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Say where rows were read from, as row, file and line."""
        files = [str(file) for file in self.files]
        return [{"row": row, "file": files[self["file"][row]], "line": int(self["line"][row])} for row in rows]

    def named(self, fault: Fault, row: int) -> Fault:
        """Put a row's file into its fault, where there are several; the next start looks at the row's images."""
        # A cache that cannot be written: --check_images finds it.
        with suppress(OSError), (self.place / DOUBTS).open("a") as file:
            file.write(f"{row}\n")
        if str(self.pictures.resolve()) in fault.what:
            fault = replace(fault, how="start the run again, which writes it anew")
        return name_file(fault, self.files, int(self["file"][row]))

    def all_faults(self) -> Iterator[Fault]:
        """Yield the fault of each record that cannot be used, in the order of the records."""
        for row in np.flatnonzero(self["tokens"] == 0).tolist():
            yield name_file(Fault(**json.loads(self._read(row)[1][0])), self.files, int(self["file"][row]))


def _images(own: pa.ListArray) -> ImageKeys:
    keys = own.values.field("key").values.to_numpy().reshape(-1, 2)
    return ImageKeys(keys, own.values.field("size").to_numpy(), own.offsets.to_numpy())


def open_made(place: Path, files: Sequence[Path], cache: Path) -> Index | None:
    """Open an index; None where there is none, or a damaged one."""
    with suppress(DamagedError):
        return Index(place, files, folder_of_pictures(cache))
    return None
