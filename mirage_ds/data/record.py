"""The record: one JSON line in the public format, its checks, and where its images lie.

    text_input    the question, with an `<image>` mark where each input image stands (no mark: images first)
    text_output   the answer, with an `<output_image>` mark where the latents stand (no mark: first in the answer)
    image_input   a path or a list of paths
    image_output  the helper image: a path, or a list for several latent runs; may be absent

or `messages`, a conversation with content items (messages.py), in place of these four. `turns_before` holds the
messages before the question. Other keys are kept as they are. Relative paths are looked for beside the file, then under
the image root, then in the working directory.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from mirage_ds.data.messages import (
    HELPER_MARK,
    IMAGE_MARK,
    TURNS_BEFORE,
    MessageError,
    check_turns,
    from_messages,
)
from mirage_ds.errors import UserError, reason, shown, strict_json

if TYPE_CHECKING:
    from datasets import Dataset

FIELDS = ("text_input", "text_output", "image_input", "image_output")
# Beyond this the image processor refuses (transformers' smart_resize).
MAX_ASPECT = 200
# Pillow warns of more as of a decompression bomb, and raises at twice as many; here both are a fault.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
# Python's own limit depends on who calls the parser, and a line must be a fault for all or for none.
MAX_DEPTH = 64
# Modes of 16 bits; Pillow would clip them to 8 instead of scaling, which leaves an almost white picture.
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")

_opening = threading.Lock()


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one record: where, what, and how to mend it.

    Attributes:
        line: from 1; of a Parquet file, the row.
        file: the record's file, where there are several.
    """

    line: int
    field: str
    what: str
    how: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.place}, {self.field}: {self.what}; {self.how}"

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"{self.file} line {self.line}" if self.file else f"line {self.line}"


class RecordError(Exception):
    """A record that cannot be used; carries its Fault."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        # Crosses process borders (data-loader workers), where Exception's own pickling would lose the Fault.
        return RecordError, (self.fault,)


@dataclass(frozen=True)
class Record:
    """One row as the user wrote it. `line` counts from 1."""

    line: int
    text_input: str
    text_output: str
    image_input: tuple[str, ...]
    image_output: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """Number of latent runs in the answer: one per mark, or one for an unmarked helper image."""
        return self.text_output.count(HELPER_MARK) or len(self.image_output)

    @property
    def turns_before(self) -> list[dict[str, str]]:
        """Messages before the question: role, and content with `<image>` marks."""
        return list(self.extra.get(TURNS_BEFORE, ()))

    @property
    def texts(self) -> list[str]:
        """All texts of the user's that may hold images, in their order: the question is the last."""
        return [*(turn["content"] for turn in self.turns_before), self.text_input]

    @property
    def marks(self) -> int:
        """Number of `<image>` marks; with none, the images stand first in the question."""
        return sum(text.count(IMAGE_MARK) for text in self.texts)

    def images(self, helpers: bool) -> list[tuple[str, str]]:
        """List (field, path) of the input images and, with `helpers`, of the helper images."""
        paths = [("image_input", path) for path in self.image_input]
        return paths + [("image_output", path) for path in self.image_output if helpers]

    def need_helper(self) -> None:
        """RecordError unless there is a helper image, which stage1 takes its targets from."""
        if not self.image_output:
            raise self.fault(
                "image_output", "stage1 needs a helper image", "add its path, or train this row in sft or stage2"
            )

    def fault(self, name: str, what: str, how: str) -> RecordError:
        """Make the error that names this record's line."""
        return RecordError(Fault(self.line, name, what, how))


def _paths(value: Any, line: int, name: str) -> tuple[str, ...]:
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str) or not item:
            raise RecordError(
                Fault(line, name, f"expected a path or a list of paths, found {shown(item)}", "write the image's path")
            )
        if "\0" in item or not _whole(item):
            raise RecordError(Fault(line, name, f"{shown(item)} can be no path", "write the image's path"))
    return tuple(values)


def _whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON can spell and no file or tokenizer can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _values(text: str, line: int) -> dict[str, Any]:
    """Parse the JSON object of one line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # read_lines lets a byte that is not UTF-8 through as half a surrogate pair, so that its line can be named.
        place = len(text[: error.start].encode("utf-8")) + 1
        what = f"not UTF-8 text (byte 0x{ord(text[error.start]) & 0xFF:02x} at place {place} of the line)"
        raise RecordError(Fault(line, "json", what, "save the file as UTF-8")) from None
    too_deep = RecordError(
        Fault(line, "json", f"more than {MAX_DEPTH} levels of lists and objects", "write a flat object")
    )
    try:
        values = strict_json(text)
    except json.JSONDecodeError as error:
        raise RecordError(
            Fault(line, "json", f"not valid JSON ({error.msg} at column {error.colno})", "write one object a line")
        ) from None
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise RecordError(Fault(line, "json", str(error), "write each key once and finite numbers")) from None
    if not isinstance(values, dict):
        raise RecordError(Fault(line, "json", f"expected an object, found {type(values).__name__}", "use {…}"))
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in level if isinstance(item, (dict, list))]
    if level:
        raise too_deep
    return values


def parse_record(text: str, line: int, answers: bool = True) -> Record:
    """Parse one JSON line; RecordError when it does not have the format.

    Args:
        answers: whether the record must have an answer; questions alone are enough to decode.
    """
    return make_record(_values(text, line), line, answers)


def make_record(values: dict[str, Any], line: int, answers: bool = True) -> Record:
    """Make a record of its keys and values; RecordError when they do not have the format.

    Args:
        answers: see parse_record.
    """
    try:
        if "messages" in values and "text_input" not in values:
            values = {
                **{k: v for k, v in values.items() if k != "messages"},
                **from_messages(values["messages"], answers),
            }
        if TURNS_BEFORE in values:
            values = {**values, TURNS_BEFORE: check_turns(values[TURNS_BEFORE])}
    except MessageError as error:
        raise RecordError(Fault(line, error.field, error.what, error.how)) from None
    if not answers:
        values.setdefault("text_output", "")
    for name in ("text_input", "text_output"):
        if name not in values:
            raise RecordError(Fault(line, name, "missing", "add it as a string"))
        if not isinstance(values[name], str):
            raise RecordError(
                Fault(line, name, f"expected a string, found {shown(values[name])}", "write it as a string")
            )
        if not _whole(values[name]):
            raise RecordError(
                Fault(line, name, "holds half a surrogate pair", "write both halves, or the character itself")
            )
    record = Record(
        line=line,
        text_input=values["text_input"],
        text_output=values["text_output"],
        image_input=_paths(values.get("image_input"), line, "image_input"),
        image_output=_paths(values.get("image_output"), line, "image_output"),
        extra={key: value for key, value in values.items() if key not in FIELDS},
    )
    for turn in record.turns_before:
        if not _whole(turn["content"]):
            raise record.fault(
                TURNS_BEFORE, "holds half a surrogate pair", "write both halves, or the character itself"
            )
    marks, images = record.marks, len(record.image_input)
    if marks and marks != images:
        raise record.fault(
            "text_input",
            f"{marks} {IMAGE_MARK} mark(s) for {images} image(s)",
            "write one mark for each image, or none (images then stand first)",
        )
    if not answers:
        return record
    marks, helpers = record.text_output.count(HELPER_MARK), len(record.image_output)
    if helpers and marks != helpers and not (marks == 0 and helpers == 1):
        raise record.fault(
            "text_output",
            f"{marks} {HELPER_MARK} mark(s) for {helpers} helper image(s)",
            "write one mark for each helper",
        )
    if not record.text_output.replace(HELPER_MARK, "").strip():
        raise record.fault("text_output", "empty answer", "write the answer that the model is to learn")
    return record


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
    """Yield (line number from 1, text) of each line of a file that is not blank; see text_lines."""
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
    """Refuse what is no file of JSON lines, by its name and kind; UserError says what it is."""
    if path.is_dir() or path.suffix == ".parquet":
        raise UserError(
            f"{path}: training reads folders and Parquet, this command reads one JSON-lines file; give such a file"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file of records")


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


@dataclass(frozen=True)
class ImageFinder:
    """Finds a record's images: beside the file, under the image root, in the working directory.

    Attributes:
        folders: where relative paths are looked for, in this order.
        within: with these, an image must lie in one of them, also behind links; None allows any place.
    """

    folders: tuple[Path, ...]
    within: tuple[Path, ...] | None = None

    @classmethod
    def beside(cls, data_path: Path, image_root: Path | None, confine: bool = False) -> ImageFinder:
        """Make the finder of one records file.

        Args:
            confine: refuse images outside the file's folder and the image root.
        """
        own = tuple(f.resolve() for f in (data_path.parent, image_root) if f is not None)
        return cls((*own, Path.cwd().resolve()), own if confine else None)

    def of(self, file: Path, pictures: Path) -> ImageFinder:
        """Make the finder that looks beside another records file, and else in the same places.

        Args:
            pictures: holds the pictures that came inside records files; never refused.
        """
        beside = file.parent.resolve()
        within = None if self.within is None else (beside, *self.within[1:], pictures.resolve())
        return ImageFinder((beside, *self.folders[1:]), within)

    def places(self, path: str) -> list[Path]:
        """List where an image may lie, in the order in which it is looked for."""
        return [Path(path)] if Path(path).is_absolute() else [folder / path for folder in self.folders]

    def find(self, record: Record, name: str, path: str) -> Path:
        """Return the image's place; RecordError that names every place looked at."""
        places = self.places(path)
        try:
            place = next((place for place in places if place.is_file()), None)
        except PermissionError as error:
            raise record.fault(
                name, f"{shown(path)} cannot be looked for ({error.strerror})", "make its folder readable"
            ) from None
        except OSError as error:
            how = "write the path of a file, not the image itself"
            raise record.fault(name, f"{shown(path)} is no path ({error.strerror})", how) from None
        if place is None:
            looked = ", ".join(str(place) for place in dict.fromkeys(places))
            raise record.fault(name, f"no image {path!r}: looked for {looked}", "correct the path or give --image_root")
        if self.within is None:
            return place
        # Returned as resolved: a link that is bent afterwards leads nowhere else.
        place = place.resolve()
        if not any(place.is_relative_to(folder) for folder in self.within):
            allowed = " and ".join(str(folder) for folder in self.within)
            raise record.fault(
                name, f"{path!r} is {place}, outside {allowed}", "copy it there, or leave --confine_paths out"
            )
        return place

    def size(self, record: Record, name: str, path: str) -> tuple[int, int]:
        """Return (height, width) in pixels, from the header alone."""
        place = self.find(record, name, path)
        try:
            with _open(place) as image:
                width, height = image.size
        except Exception as error:  # noqa: BLE001  # see _broken
            raise _broken(record, name, place, error) from None
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise record.fault(
                name, f"image {place} is {width}×{height}, a side ratio above {MAX_ASPECT}", "crop or replace it"
            )
        return height, width

    def load(self, record: Record, name: str, path: str) -> Image.Image:
        """Decode the image, of an animation the first picture, to RGB; transparency is dropped."""
        place = self.find(record, name, path)
        try:
            with _open(place) as image:
                size, mode = image.size, image.mode
                made = None if mode in ("I", "F") else _rgb(image)
        except Exception as error:  # noqa: BLE001  # see _broken
            raise _broken(record, name, place, error) from None
        if made is None:
            raise record.fault(
                name, f"image {place} has 32 bits a channel (mode {mode}), of unknown range", "save it with 8 bits"
            )
        if made.size != size:
            raise record.fault(
                name, f"image {place} holds a picture of another size than its header says", "replace the file"
            )
        return made


def _open(place: Path) -> Image.Image:
    """Open an image, decoding nothing; also what Pillow only warns of as of a decompression bomb is raised."""
    # Filters of warnings belong to the process, and images are checked in threads.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(place)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any 8-bit or 16-bit mode to RGB."""
    if image.mode in MODES_16_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The same colours as directly, without Pillow's warning.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _broken(record: Record, name: str, place: Path, error: Exception) -> RecordError:
    """Make the error of a file that Pillow fails on.

    A broken file leads Pillow's decoders to exceptions of almost any class (OSError, SyntaxError, struct.error,
    IndexError …); whichever it is, the file is what the user can mend, and the message keeps the reason.
    """
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return record.fault(name, f"image {place} has more than {MAX_PIXELS:,} pixels", "make it smaller")
    if isinstance(error, OSError) and error.errno is not None:
        return record.fault(name, f"image {place} cannot be read ({error.strerror})", "make it readable")
    return record.fault(name, f"image {place} cannot be decoded ({reason(error)})", "replace the file")


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
