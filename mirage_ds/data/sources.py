"""Where records come from: files of records, one of them, a folder or a glob pattern; read piece by piece.

pyarrow reads the tables. `datasets` streams them too, but it locks files in its cache, logs what it raises, and decodes
images unless each column is cast.

Files are taken in the order of their names. A record's line counts from 1 within its file; in JSON arrays, Parquet and
Arrow it is the row. Pictures inside a record (inside.py) are written into the cache once and are read from there like
any other.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from mirage_ds.config.mixture import Records
from mirage_ds.data.flat import READERS
from mirage_ds.data.folders import find_files, readable
from mirage_ds.data.inside import writable
from mirage_ds.data.kinds import head_of, kind_of
from mirage_ds.errors import UserError, reason
from mirage_ds.files import write_new

Raw = str | dict[str, Any]
# A piece is what one process makes at a time, and what a killed start loses: some hundred records.
PIECE_BYTES = 1 << 18
# Rows of a Parquet file lie in groups, and to reach a row all before it in its group are read.
PIECE_ROWS = 8192
BATCH_ROWS = 256
# A file that was written just now may be written again within the tick of the file system's clock.
SETTLED_NS = 2_000_000_000


class Piece(NamedTuple):
    """A part of a records file.

    Attributes:
        file: its number among the files.
        start, stop: bytes of a text file, rows of a Parquet file's group or of an Arrow file.
        first: line (or row) number of its first record.
        group: of a Parquet file.
    """

    file: int
    start: int
    stop: int
    first: int
    group: int | None = None


class Stamp(NamedTuple):
    """What tells, without reading it, that a file is still the one it was."""

    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> Self:
        """Look at a file; UserError where it cannot be looked at."""
        with readable(file):
            found = file.stat()
        return cls(found.st_size, found.st_mtime_ns)


# ------------------------------------------------------------------------------------------------------------- hashes


def content_hash(file: Path, cache: Path) -> str:
    """SHA-256 of a file's content; remembered in the cache for as long as its size and time stay the same.

    Raises:
        UserError: the file cannot be read, or the cache not written.
    """
    stamp = Stamp.of(file)
    # Size, time and hash.
    note = cache / "hashes" / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()}.txt"
    with writable(cache):
        known = note.read_text(errors="replace").split() if note.exists() else []
    if known[:-1] == [str(number) for number in stamp]:
        return known[-1]
    with readable(file):
        made = hash_of(file)
    if time.time_ns() - stamp.mtime_ns > SETTLED_NS:
        with writable(cache):
            write_new(note, f"{stamp.bytes} {stamp.mtime_ns} {made}".encode())
    return made


def hash_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_of_records(data_path: Path) -> str:
    """Hash the content of all files of a source, as data_hash does."""
    return data_hash([hash_of(file) for file in find_files(data_path)])


def data_hash(hashes: Sequence[str]) -> str:
    """Hash of all records: a single file's own, or the SHA-256 of the hashes of several."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- pieces


def pieces(files: Sequence[Path]) -> Iterator[Piece]:
    """Cut the files into pieces, in the order of their records.

    Raises:
        UserError: a file cannot be read, or is of another kind.
    """
    for number, file in enumerate(files):
        with readable(file):
            kind = kind_of(file)
            if kind not in READERS:
                yield from _table_pieces(number, file)
                continue
            with file.open("rb") as content:
                yield from _joined(number, READERS[kind](content, file))


def _joined(number: int, parts: Iterator[tuple[int, int, int, Any]]) -> Iterator[Piece]:
    """Join records to pieces: the end of one is where the next may begin."""
    held: Piece | None = None
    for line, start, stop, _ in parts:
        if held is None:
            held = Piece(number, start, stop, line)
        held = held._replace(stop=stop)
        if stop - held.start >= PIECE_BYTES:
            yield held
            held = None
    if held is not None:
        yield held


def _table_pieces(number: int, file: Path) -> Iterator[Piece]:
    groups: list[tuple[int | None, int]]
    if kind_of(file) == "parquet":
        meta = _parquet(file).metadata
        groups = [(group, meta.row_group(group).num_rows) for group in range(meta.num_row_groups)]
    else:
        groups = [(None, sum(map(len, _arrow_batches(file))))]
    first = 1
    for group, rows in groups:
        for start in range(0, rows, PIECE_ROWS):
            yield Piece(number, start, min(start + PIECE_ROWS, rows), first + start, group)
        first += rows


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Yield the batches of an Arrow file, as Feather has it, or of a stream; of a mapped file nothing is copied."""
    import pyarrow as pa

    with _explained(file), pa.memory_map(str(file)) as content:
        if head_of(file).startswith(b"ARROW1"):
            table = pa.ipc.open_file(content)
            yield from map(table.get_batch, range(table.num_record_batches))
        else:
            yield from pa.ipc.open_stream(content)


def _parquet(file: Path) -> Any:
    import pyarrow.parquet as pq

    with _explained(file):
        return pq.ParquetFile(file)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn what a file leads Arrow to into a sentence."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # Arrow's own OSError has no number; the system's is no matter of the content.
        if getattr(error, "errno", None) is not None:
            raise
        what = f"cannot be read as {kind_of(file).capitalize()} ({reason(error)})"
        raise UserError(f"{file}: {what}; write it anew") from None


def columns_of(file: Path) -> list[str]:
    """Return the names of a Parquet or Arrow file's columns; UserError where it cannot be read."""
    if kind_of(file) == "parquet":
        return list(_parquet(file).schema_arrow.names)
    return next((batch.schema.names for batch in _arrow_batches(file)), [])


def rows_of(piece: Piece, file: Path, columns: Collection[str] | None = None) -> Iterator[tuple[int, Raw]]:
    """Yield (line number, text) of JSON lines and of a JSON array's items, (row, values) of the other kinds.

    Args:
        file: the piece's file.
        columns: of Parquet and Arrow files only these; None for all.

    Raises:
        UserError: the file cannot be read.
    """
    with readable(file):
        kind = kind_of(file)
        if kind not in READERS:
            yield from enumerate(_rows_of_batches(piece, file, columns), piece.first)
            return
        with file.open("rb") as content:
            for line, _, _, row in READERS[kind](content, file, piece.start, piece.stop, piece.first):
                yield line, row


def _rows_of_batches(piece: Piece, file: Path, columns: Collection[str] | None) -> Iterator[dict[str, Any]]:
    at, names = 0, columns and list(columns)
    with _explained(file):
        if piece.group is None:
            batches = (batch.select(names or batch.schema.names) for batch in _arrow_batches(file))
        else:
            batches = _parquet(file).iter_batches(BATCH_ROWS, row_groups=[piece.group], columns=names)
        for batch in batches:
            low, high = max(0, piece.start - at), min(len(batch), piece.stop - at)
            at += len(batch)
            # Few at a time: a batch of `datasets` may hold a thousand pictures.
            for start in range(low, high, BATCH_ROWS):
                own = batch.slice(start, min(BATCH_ROWS, high - start))
                # Text that is no UTF-8 is said here and not as a puzzle later.
                own.validate(full=True)
                yield from dicts_of(own)
            if at >= piece.stop:
                return


def dicts_of(rows: Any) -> list[dict[str, Any]]:
    """Return the rows of an Arrow table or batch; numbers of `datasets`' ClassLabels as the names that they stand for.

    A number without a name, such as -1 for none, is None.
    """
    features = json.loads((rows.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    classes = {
        key: one["names"] for key, one in features.items() if one.get("_type") == "ClassLabel" and "names" in one
    }
    made = rows.to_pylist()
    for row in made if classes else ():
        for key in classes.keys() & row.keys():
            row[key] = dict(enumerate(classes[key])).get(row[key])
    return made


def count_rows(files: Sequence[Path]) -> int:
    """Count the rows of files; those of Parquet and Arrow are not read for that. UserError where one cannot be read."""
    count = 0
    for piece in pieces(files):
        file = files[piece.file]
        in_table = kind_of(file) not in READERS
        count += piece.stop - piece.start if in_table else sum(1 for _ in rows_of(piece, file))
    return count


def no_record(data_path: Records) -> UserError:
    """Make the error of a source that holds nothing."""
    return UserError(f"{data_path}: holds no record; expected one JSON object a line, or the rows of a table")


def check_unchanged(files: Sequence[Path], stamps: Sequence[Stamp]) -> None:
    """UserError where a file is another one than when its stamp was taken, or none any more."""
    for file, stamp in zip(files, stamps, strict=True):
        if Stamp.of(file) != stamp:
            raise UserError(f"{file}: changed while it was read; leave it alone and start again")
