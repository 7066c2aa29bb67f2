"""Write a JSONL file of records and its pictures, whole or not at all.

Everything is written into a temporary folder beside the target and moved at the end, the JSONL file last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError
from mirage_ds.files import TROUBLES, check_output
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.report import Advance

# Rows, and the pictures in them, that are held at a time.
ROWS_AT_A_TIME = 64

# A line of the file, and its pictures by their paths beside the file.
Line = tuple[str, dict[str, Picture]]


@dataclass(frozen=True)
class Written:
    """What was written: the file, its rows, and how many pictures are new."""

    file: Path
    records: int
    images: int


def new_target(out: Path, name: str) -> Path:
    """Return the place of `out`/`name`.jsonl, which nothing may stand at.

    Raises:
        UserError: `out` is a file, or the target exists.
    """
    target = out.resolve() / f"{name}.jsonl"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    check_output(out, "--out", folder=True)
    if target.exists():
        raise UserError(f"{out / target.name} exists; remove it, or choose another --out or --name")
    return target


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`; at the end move its files into `out`, and on an error remove it.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    place = out.resolve()
    work = place.with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        yield work
        # Pictures first: a JSONL file never stands there without them.
        files = [path for path in work.rglob("*") if path.is_file()]
        for source in sorted(files, key=lambda path: path.suffix == ".jsonl"):
            target = place / source.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    except OSError as error:
        if error.errno not in TROUBLES:
            raise
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def image_keys(inputs: Sequence[str], helpers: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a record that name its images: one path, or a list of several."""
    keys = {"image_input": inputs, "image_output": helpers}
    return {key: list(paths) if len(paths) > 1 else paths[0] for key, paths in keys.items() if paths}


def new_pictures(out: Path, rows: Iterable[dict[str, Picture]]) -> dict[str, Picture]:
    """Return the pictures of some rows that `out` does not hold yet."""
    return {name: one for pictures in rows for name, one in pictures.items() if not (out / name).exists()}


@contextmanager
def _painters() -> Iterator[ThreadPoolExecutor]:
    """Yield threads on all cores: compressing pictures is most of the work."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    finally:
        # Whoever stops the work does not wait for the pictures that nobody began.
        pool.shutdown(cancel_futures=True)


def write_records(out: Path, name: str, lines: Iterable[Line], total: int | None, progress: Advance | None) -> Written:
    """Write `out`/`name`.jsonl and the pictures that are not there yet.

    Args:
        lines: taken ROWS_AT_A_TIME, so that an iterator's never lie in memory together.
        total: new pictures in all, where that is known.
        progress: called with (pictures written, total).

    Raises:
        UserError: the target exists, or cannot be written.
    """
    target = new_target(out, name)
    known: set[str] = set()
    count = 0
    with (
        whole_or_nothing(out) as work,
        _painters() as pool,
        (work / target.name).open("w", encoding="utf-8", newline="\n") as file,
    ):

        def save(name: str, picture: Picture) -> None:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(picture.content())

        waiting = iter(lines)
        while some := list(islice(waiting, ROWS_AT_A_TIME)):
            file.writelines(line for line, _ in some)
            pictures = new_pictures(target.parent, (own for _, own in some))
            new = {name: one for name, one in pictures.items() if name not in known}
            for done, _ in enumerate(pool.map(save, new, new.values()), len(known) + 1):
                if progress is not None:
                    progress(done, total)
            known.update(new)
            count += len(some)
    return Written(target, count, len(known))
