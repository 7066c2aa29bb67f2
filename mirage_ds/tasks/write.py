"""Write a JSONL file of records and its pictures, whole or not at all.

Everything is written into a temporary folder beside the target and moved at the end, the JSONL file last.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mirage_ds.data.progress import progress_bar
from mirage_ds.errors import UserError, is_text
from mirage_ds.files import TROUBLES, check_output
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.task import Settings

# Rows, and the pictures in them, that are held at a time.
ROWS_AT_A_TIME = 64


class Row(NamedTuple):
    """A record to be.

    Attributes:
        inputs, helpers: images, each a file there is, or a picture that is to be written.
        extra: keys beside the four of the format.
    """

    text_input: str
    text_output: str
    inputs: tuple[Path | Picture, ...]
    helpers: tuple[Path | Picture, ...]
    extra: dict[str, Any]

    @property
    def pictures(self) -> dict[str, Picture]:
        """The pictures that are to be written, by their paths beside the file."""
        return {f"images/{one.name}": one for one in (*self.inputs, *self.helpers) if isinstance(one, Picture)}

    def record(self, out: Path) -> dict[str, Any]:
        """Return the record's keys in a file in `out`, its images' paths relative to it: one path, or a list."""
        keys: dict[str, Any] = {"text_input": self.text_input, "text_output": self.text_output}
        for name, images in (("image_input", self.inputs), ("image_output", self.helpers)):
            paths = [
                f"images/{one.name}" if isinstance(one, Picture) else Path(os.path.relpath(one, out)).as_posix()
                for one in images
            ]
            keys |= {name: paths if len(paths) > 1 else paths[0]} if paths else {}
        return keys | self.extra

    def line(self, out: Path) -> str:
        """Write the record as a line of a file in `out`."""
        record = self.record(out)
        text = json.dumps(record, ensure_ascii=False)
        # Half a surrogate pair in a key of the user's: no file can hold it, only JSON's escape.
        return (text if is_text(text) else json.dumps(record)) + "\n"


class Written(NamedTuple):
    """What was written: the file, its rows, and how many pictures are new."""

    file: Path
    records: int
    images: int


def new_target(settings: Settings) -> Path:
    """Return the place of the JSONL file, which nothing may stand at.

    Raises:
        UserError: --out is a file, or the target exists.
    """
    out = settings.out
    target = out.resolve() / f"{settings.name}.jsonl"
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


def _new_pictures(rows: Iterable[Row], *folders: Path) -> dict[str, Picture]:
    """Return the pictures of some rows that none of the folders holds yet."""
    pictures = {name: one for row in rows for name, one in row.pictures.items()}
    return {name: one for name, one in pictures.items() if not any((folder / name).exists() for folder in folders)}


def write_rows(rows: Iterable[Row], settings: Settings) -> Written:
    """Write the JSONL file, and the pictures that are not there yet under images/ beside it.

    Args:
        rows: taken ROWS_AT_A_TIME, so that an iterator's never lie in memory together.

    Raises:
        UserError: the target exists, or cannot be written.
    """
    target = new_target(settings)
    total = len(_new_pictures(rows, target.parent)) if isinstance(rows, Sequence) else None
    count = images = 0
    with (
        whole_or_nothing(settings.out) as work,
        # Compressing pictures is most of the work.
        ThreadPoolExecutor() as pool,
        (work / target.name).open("w", encoding="utf-8", newline="\n") as file,
        progress_bar("pictures") as advance,
    ):

        def save(name: str, picture: Picture) -> None:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(picture.content())

        waiting = iter(rows)
        while some := list(islice(waiting, ROWS_AT_A_TIME)):
            file.writelines(row.line(target.parent) for row in some)
            new = _new_pictures(some, target.parent, work)
            for done, _ in enumerate(pool.map(save, new, new.values()), images + 1):
                advance(done, total)
            count += len(some)
            images += len(new)
    return Written(target, count, images)
