"""What others hand out: which files of a data set are meant, their rows, a batch at a time, and their images."""

import io
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from mirage_ds.data.folders import readable
from mirage_ds.data.images import opened
from mirage_ds.data.kinds import kind_of
from mirage_ds.data.messages import HELPER_MARK, IMAGE_MARK
from mirage_ds.data.record import blamed, parse_object
from mirage_ds.data.sources import columns_of, count_rows, pieces, rows_of
from mirage_ds.errors import UserError, reason, shown
from mirage_ds.tasks.draft import BuildReport, Draft, Picture
from mirage_ds.tasks.task import Settings

TABLES = (".parquet", ".arrow")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# name-00000-of-00003, with a hash behind it where an older library wrote it
_SHARD = re.compile(r"[-_]\d+-of-\d+(-[0-9a-f]+)?$")


class ConvertSettings(Settings):
    """What every conversion is told."""

    count: int | None = Field(None, ge=1, description="rows to take, drawn by the seed [default: all]")
    seed: int = Field(0, description="of what is drawn; the same seed gives the same bytes")
    skip_bad_records: bool = Field(False, description="leave bad rows out and count them, instead of refusing")


class BadRow(ValueError):
    """A row that cannot become a record; the message says what is wrong with it."""


class Row(NamedTuple):
    """One row of the source.

    Attributes:
        number: from 0, through all its files.
        folder: where its relative paths begin.
        where: its place for messages.
    """

    number: int
    values: dict[str, Any]
    folder: Path
    where: str

    def text(self, name: str) -> str:
        """Return a text; BadRow where there is none, or a blank one."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f"{name} is {shown(value)}, not a text")
        return value

    def texts(self, name: str) -> list[str]:
        """Return the options of a question, at least two texts; BadRow where it is something else."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) and item for item in value):
            raise BadRow(f"{name} is {shown(value)}, not a list of two texts or more")
        return value

    def objects(self, name: str) -> list[dict[str, Any]]:
        """Return a list of objects, at least one; BadRow where it is something else."""
        value = self.values.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            raise BadRow(f"{name} is {shown(value)}, not a list of objects")
        return value

    def picture(self, value: Any, what: str) -> Picture:
        """Take an image as it is stored: bytes, a path, or `datasets`' {bytes, path}. It is decoded once, to be sure.

        Args:
            value: a text is a path in the row's folder; a Path stands for itself.
            what: how messages call it.

        Raises:
            BadRow: no image, or one that cannot be decoded.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            value = self.folder / value
        if isinstance(value, Path):
            try:
                value = value.read_bytes()
            except OSError as error:
                raise BadRow(f"{what} {value} cannot be read ({error.strerror})") from None
        if not isinstance(value, bytes) or not value:
            raise BadRow(f"{what} is {shown(value)}, not an image")
        return Picture.stored(value, suffix_of(value, what))


def suffix_of(content: bytes, what: str) -> str:
    """Decode an image; return the suffix of its format, or raise BadRow that calls it `what`."""
    try:
        with opened(io.BytesIO(content)) as image:
            image.load()
            return (image.format or "png").lower().replace("jpeg", "jpg")
    except Exception as error:  # noqa: BLE001  # broken files lead Pillow's decoders to errors of almost any class
        raise BadRow(f"{what} cannot be decoded ({reason(error)})") from None


# ---------------------------------------------------------------------------------------------------------------- files


def find_tables(source: Path, folder: str = "", split: str | None = None) -> list[Path]:
    """Return the Parquet or Arrow files of a source, in the order of their names.

    Args:
        folder: of a source with several data sets, the one meant: only files below a folder of this name count.
        split: of several splits the one meant, as it stands in the files' names.

    Raises:
        UserError: no such file, or it cannot be known which split is meant.
    """
    there = [source] if source.is_file() else sorted(source.rglob("*"))
    files = [path for path in there if path.suffix in TABLES and path.is_file()]
    if not files:
        raise UserError(f"{source}: no Parquet or Arrow file, nor one in it; name the data set's file or folder")
    if source.is_file():
        return files
    files = [path for path in files if folder in path.relative_to(source).parts[:-1]] or files
    splits: dict[str, list[Path]] = {}
    for path in files:
        name = _SHARD.sub("", path.stem)
        # save_to_disk calls every split's files data-…, in a folder of the split's name.
        splits.setdefault(path.parent.name if name == "data" else name, []).append(path)
    fitting = [name for name in splits if split is None or name == split or name.endswith((f"_{split}", f"-{split}"))]
    if not fitting:
        raise UserError(f"{source}: has no split '{split}'; there are {', '.join(splits)}")
    if len(fitting) != 1:
        raise UserError(f"{source}: has the splits {', '.join(splits)}; say which one with --split, or name its file")
    return splits[fitting[0]]


def images_among(paths: Iterable[Path], where: str) -> list[Path]:
    """Return the images among a folder's files, in order; UserError, which calls the folder `where`, without any."""
    found = sorted(path for path in paths if path.suffix.lower() in IMAGES and path.is_file())
    if not found:
        raise UserError(f"{where}: no such folder, or no image in it ({', '.join(IMAGES)}); name the one that has them")
    return found


def need_columns(files: Sequence[Path], names: Collection[str]) -> None:
    """Raise UserError when a file lacks a column."""
    for file in files:
        found = columns_of(file)
        missing = " and ".join(name for name in names if name not in found)
        if missing:
            raise UserError(f"{file}: has no column {missing}, only {', '.join(found)}; name the data set that has it")


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """UserError where the file cannot be read, or a line is no object."""
    with blamed(f"{file}, "), readable(file, "make it readable"):
        yield


def read_rows(files: Sequence[Path], columns: Collection[str] | None = None) -> Iterator[Row]:
    """Yield the rows of files of any form that training reads.

    Args:
        columns: of Parquet and Arrow files only these; None for all.

    Raises:
        UserError: as in reading.
    """
    number = 0
    for piece in pieces(files):
        file = files[piece.file]
        unit = "line" if kind_of(file) in ("lines", "table") else "row"
        for line, raw in rows_of(piece, file, columns):
            with reading(file):
                values = parse_object(raw, line) if isinstance(raw, str) else raw
            yield Row(number, values, file.parent, f"{file}, {unit} {line}")
            number += 1


# ----------------------------------------------------------------------------------------------------------------- rows


def type_name(text: str) -> str:
    """Return a row's type as types are compared."""
    return text.strip().lower().replace("_", "-").replace(" ", "-")


def of_types(
    rows: Iterable[Row], key: str, flag: str, types: list[str], report: BuildReport, untyped: bool = False
) -> Iterator[Row]:
    """Yield the rows of some types, or of "all"; the others are counted as excluded.

    Args:
        key: where a row says its type.
        flag: how the user names the types.
        untyped: whether rows without a type are taken.

    Raises:
        UserError: there is no such row; it names the types that there are.
    """
    wanted = {type_name(text) for text in types}
    found: Counter[str] = Counter()
    taken = 0
    for row in rows:
        kind = str(row.values.get(key) or "")
        found[kind or "no type"] += 1
        if "all" in wanted or type_name(kind) in wanted or (untyped and not kind):
            taken += 1
            yield row
        else:
            report.excluded += 1
    if not taken:
        there = ", ".join(f"{kind} ({count})" for kind, count in found.most_common()) or "no row at all"
        raise UserError(f"{flag} {', '.join(types)}: no row is of one of them; the data has {there}")


def drafts(
    files: Sequence[Path],
    make: Callable[[Row], Draft],
    settings: ConvertSettings,
    report: BuildReport,
    fitting: Iterable[Row] | None = None,
) -> Iterator[Draft]:
    """Make the drafts of the rows that the settings draw; a row that is a record already is kept and counted.

    Args:
        make: a draft with a `question`, which is asked as in choices.marked_question.
        fitting: the rows that may be drawn; None for all.

    Raises:
        UserError: too few rows, or a bad one, unless those are to be left out.
    """
    numbers = range(count_rows(files)) if fitting is None else [row.number for row in fitting]
    if settings.count and settings.count > len(numbers):
        raise UserError(f"--count is {settings.count}, but there are only {len(numbers)} rows to take; ask for fewer")
    chosen = set(random.Random(f"{settings.seed}/rows").sample(numbers, settings.count) if settings.count else numbers)
    report.duplicates_kept = True
    if settings.skip_bad_records:
        report.note("bad rows left out", 0)
    seen: set[tuple[str, ...]] = set()
    for row in read_rows(files):
        if row.number not in chosen:
            continue
        try:
            draft = make(row)
            _check_marks(draft)
        except BadRow as error:
            if not settings.skip_bad_records:
                raise UserError(f"{row.where}: {error}; fix it, or leave such rows out by --skip_bad_records") from None
            report.note("bad rows left out")
            continue
        asked = f"{draft.extra['question']} {sorted(draft.extra.get('options', ()))}"
        known = (asked, draft.text_output, *(picture.name for picture in (*draft.images, *draft.helpers)))
        report.duplicates += known in seen
        seen.add(known)
        yield draft


def _check_marks(draft: Draft) -> None:
    """BadRow where a question or an answer has marks for other pictures than its own."""
    question, answer = draft.extra["question"], draft.text_output
    if HELPER_MARK in question or IMAGE_MARK in answer:
        raise BadRow(f"its question spells {HELPER_MARK}, or its answer {IMAGE_MARK}, which mean images here")
    sides = ("question", question, IMAGE_MARK, draft.images), ("answer", answer, HELPER_MARK, draft.helpers)
    for name, text, mark, pictures in sides:
        if text.count(mark) not in (0, len(pictures)):
            raise BadRow(f"its {name} has {text.count(mark)} {mark} marks for {len(pictures)} images")
