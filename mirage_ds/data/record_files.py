"""Files of records: JSON lines → Records and faults, and as a memory-mapped Arrow dataset."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mirage_ds.data.kinds import is_parquet, need_json_lines
from mirage_ds.data.record import Fault, Record, RecordError, parse_record
from mirage_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def text_lines(file: BinaryIO, first: int = 1) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of each line that is not blank.

    A byte that is not UTF-8 arrives as half a surrogate pair; parse_record says it.

    Args:
        first: number of the first line; the whole file has 1.
    """
    # -sig: some editors begin a UTF-8 file with a mark, which is no part of its first record.
    encoding = "utf-8-sig" if first == 1 else "utf-8"
    with io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape") as text_file:
        for line, text in enumerate(text_file, start=first):
            if text.strip():
                yield line, text


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of each line of a file that is not blank; see text_lines.

    Raises:
        UserError: the file as a whole is something else.
    """
    need_json_lines(path)
    with path.open("rb") as file:
        yield from text_lines(file)


def _parsed(path: Path, answers: bool) -> Iterator[Record | Fault]:
    """Yield what each line that is not blank holds."""
    for line, text in read_lines(path):
        try:
            yield parse_record(text, line, answers)
        except RecordError as error:
            yield error.fault


def need_lines(path: Path) -> None:
    """Refuse a folder, Parquet and what is not there; UserError says so. The rest read_lines says."""
    if path.is_dir() or (path.is_file() and is_parquet(path)):
        raise UserError(
            f"{path}: training reads folders and Parquet, this command reads one JSON-lines file; give such a file"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file of records")


def read_records(path: Path, answers: bool = True) -> list[Record]:
    """Read a whole file as `scan` does; its first fault is a UserError."""
    records, faults = scan(path, answers)
    if faults:
        raise UserError(f"{path}: {faults[0]}; `mirage-ds data check {path}` lists all faults")
    return records


def scan(path: Path, answers: bool = True) -> tuple[list[Record], list[Fault]]:
    """Read a whole file; return the records that have the format and the faults of the others.

    Args:
        answers: see parse_record.

    Raises:
        UserError: the file is missing, cannot be read, or holds no record.
    """
    records: list[Record] = []
    faults: list[Fault] = []
    try:
        need_lines(path)
        for found in _parsed(path, answers):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                records.append(found)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a readable file of records") from None
    if not records and not faults:
        raise UserError(f"{path}: holds no record; expected one JSON object a line")
    return records, faults


def _rows(path: str, digest: str) -> Iterator[dict[str, Any]]:
    """Yield the Arrow rows of the records that `scan` returns (`digest` only keys the cache)."""
    del digest
    for record in _parsed(Path(path), answers=True):
        if not isinstance(record, Fault):
            yield row_of(record)


def open_records(path: Path, cache_dir: Path | None) -> Dataset:
    """Open a records file as a memory-mapped Arrow dataset, a row for each record that `scan` returns, in file order.

    Whether lines with faults may be left out is decided before (loader.build_index).
    """
    import datasets

    datasets.disable_progress_bars()
    strings = datasets.List(datasets.Value("string"))
    features = datasets.Features(
        line=datasets.Value("int64"),
        text_input=datasets.Value("string"),
        text_output=datasets.Value("string"),
        image_input=strings,
        image_output=strings,
        extra=datasets.Value("string"),
    )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return datasets.Dataset.from_generator(
        _rows,
        features=features,
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"path": str(path.resolve()), "digest": digest},
    )


def row_of(record: Record) -> dict[str, Any]:
    """Turn a Record into an Arrow row."""
    return {
        "line": record.line,
        "text_input": record.text_input,
        "text_output": record.text_output,
        "image_input": list(record.image_input),
        "image_output": list(record.image_output),
        # Free-form keys have no common Arrow type, so they travel as JSON. Parquet has values that JSON lacks (dates).
        "extra": json.dumps(record.extra, default=str),
    }


def record_of(row: dict[str, Any]) -> Record:
    """Turn an Arrow row back into its Record."""
    return Record(
        line=row["line"],
        text_input=row["text_input"],
        text_output=row["text_output"],
        image_input=tuple(row["image_input"]),
        image_output=tuple(row["image_output"]),
        extra=json.loads(row["extra"]),
    )
