"""Joining the parts of an index (data/parts.py) into its files, and putting them at their place, whole or not at all.

R rows, I images of a field.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    crc_of,
    digest_of,
)
from mirage_ds.data.inside import folder_of_pictures
from mirage_ds.data.parts import Part
from mirage_ds.files import sync

# What a killed run has left behind is removed by a later one, that no longer takes it for another's work in progress.
ABANDONED_S = 7 * 24 * 3600.0


class Writer:
    """Writes parts, one behind the other, into the files of an index."""

    def __init__(self, folder: Path, keep: Sequence[str], stack: ExitStack):
        self.folder = folder
        self.rows = self.count = self.faults = 0
        self.images = dict.fromkeys(keep, 0)
        self.pictures: dict[str, list[pa.Table]] = {"pictures.arrow": [], "suspects.arrow": []}
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
        numbers = part["numbers"]
        for name in COLUMNS:
            self._append(name, numbers[name].to_numpy())
        for name in self.images:
            high, low, size = (part[name][column].to_numpy() for column in ("high", "low", "size"))
            self._append(f"{name}.keys", np.stack([high, low], axis=1))
            self._append(f"{name}.sizes", size)
            self._append(f"{name}.starts", self.images[name] + np.cumsum(numbers[name].to_numpy()))
            self.images[name] += len(size)
        self._append("batch", self.rows + np.arange(0, len(numbers), BATCH_ROWS))
        for table in ("records", "rows"):
            for batch in part[table].combine_chunks().to_batches(BATCH_ROWS):
                self.tables[f"{table}.arrow"].write_batch(batch)
        row = part["faults"]["row"].to_numpy()
        here = pa.array(np.where(row < 0, row, row + self.rows))
        self.tables["faults.arrow"].write_table(part["faults"].set_column(0, "row", here))
        for name, tables in self.pictures.items():
            tables.append(part[name.removesuffix(".arrow")])
        self.rows += len(numbers)
        self.count += len(numbers) + int((row < 0).sum())
        self.faults += len(row)

    def finish(self, finder: ImageFinder, source: str, pictures: Path) -> None:
        """Write the images looked at, and the header; the other files are closed.

        Args:
            pictures: where pictures that came inside records files lie.
        """
        for name, tables in self.pictures.items():
            seen = pa.concat_tables([PICTURE_SCHEMA.empty_table(), *tables]).combine_chunks()
            # Every part names the images that its records show.
            seen = seen.group_by(PICTURE_SCHEMA.names, use_threads=False).aggregate([])
            seen = seen.sort_by([(column, "ascending") for column in PICTURE_SCHEMA.names])
            with (self.folder / name).open("wb") as file, pa.ipc.new_file(file, PICTURE_SCHEMA) as writer:
                writer.write_table(seen, PICTURE_BATCH)
            if name == "pictures.arrow":
                place = seen["place"].to_numpy()
                inside = bool(pc.any(pc.starts_with(seen["path"], f"{pictures.resolve()}/")).as_py())
        last = len(finder.folders) - 1
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
            inside=inside,
            columns=columns,
            files=files,
        )
        header["digest"] = digest_of(header)
        (self.folder / HEADER).write_text(json.dumps(header))


def put(own: EncodedRows, place: Path, cache: Path) -> EncodedRows:
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


def remove_abandoned(folder: Path) -> None:
    """Remove what lies under a name of work in progress and has not been touched for long."""
    for left in folder.glob(".*"):
        try:
            old = time.time() - left.stat().st_mtime > ABANDONED_S
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(left, ignore_errors=True)


def open_made(place: Path, files: Sequence[Path], cache: Path) -> EncodedRows | None:
    """Open an index; None where there is none, or a damaged one."""
    try:
        return EncodedRows(place, files, folder_of_pictures(cache))
    except DamagedError:
        return None
