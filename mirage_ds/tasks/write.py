"""Write a JSONL file of records and its pictures, whole or not at all.

Everything is written into a temporary folder beside the target and moved at the end, the JSONL file last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mirage_ds.errors import UserError
from mirage_ds.files import check_output
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.report import Advance


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
    """Yield a new folder beside `out`; at the end move its files into `out`, and on an error remove it."""
    work = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        yield work
        # Pictures first: a JSONL file never stands there without them.
        files = [path for path in work.rglob("*") if path.is_file()]
        for source in sorted(files, key=lambda path: path.suffix == ".jsonl"):
            target = out / source.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Painter:
    """Writes pictures under a folder, each once; compressing them is most of a build and runs on all cores."""

    def __init__(self, folder: Path, total: int | None, progress: Advance | None):
        self.folder, self.total, self.progress = folder, total, progress
        self.pool = ThreadPoolExecutor()
        self.known: set[str] = set()

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever stops the build does not wait for the pictures that nobody began.
        self.pool.shutdown(cancel_futures=True)

    @property
    def written(self) -> int:
        """How many pictures are written."""
        return len(self.known)

    def write(self, pictures: dict[str, Picture]) -> None:
        """Write those pictures that are not written yet; the keys are their paths in the folder."""
        new = [name for name in pictures if name not in self.known]
        for parent in {(self.folder / name).parent for name in new}:
            parent.mkdir(parents=True, exist_ok=True)

        def save(name: str) -> None:
            (self.folder / name).write_bytes(pictures[name].content())

        # The very first one alone: it may take tiles from a renderer, which is no matter for threads.
        first = 0 if self.known else 1
        for name in new[:first]:
            save(name)
        begun = len(self.known)
        for done, _ in enumerate(self.pool.map(save, new[first:]), begun + first + 1):
            if self.progress is not None:
                self.progress(done, self.total)
        self.known.update(new)
