"""The record: one JSON line in the public format, its checks, and where its images lie.

    text_input    the question, with an `<image>` mark where each input image stands (no mark: images first)
    text_output   the answer, with an `<output_image>` mark where the latents stand (no mark: first in the answer)
    image_input   a path or a list of paths
    image_output  the helper image: a path, or a list for several latent runs; may be absent

Other keys are kept as they are. Relative paths are looked for beside the file, then under the image root, then in the
working directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mirage_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_MARK = "<image>"
HELPER_MARK = "<output_image>"
FIELDS = ("text_input", "text_output", "image_input", "image_output")
# Beyond this the image processor refuses (transformers' smart_resize).
MAX_ASPECT = 200


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one record: where, what, and how to mend it."""

    line: int
    field: str
    what: str
    how: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.field}: {self.what}; {self.how}"


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

    def images(self, helpers: bool) -> list[tuple[str, str]]:
        """List (field, path) of the input images and, with `helpers`, of the helper images."""
        paths = [("image_input", path) for path in self.image_input]
        return paths + [("image_output", path) for path in self.image_output if helpers]

    def fault(self, name: str, what: str, how: str) -> RecordError:
        """Make the error that names this record's line."""
        return RecordError(Fault(self.line, name, what, how))


def _paths(value: Any, line: int, name: str) -> tuple[str, ...]:
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str) or not item:
            raise RecordError(
                Fault(line, name, f"expected a path or a list of paths, found {item!r}", "write the image's path")
            )
    return tuple(values)


def parse_record(text: str, line: int, answers: bool = True) -> Record:
    """Parse one JSON line; RecordError when it does not have the format.

    Args:
        answers: whether the record must have an answer; questions alone are enough to decode.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(
            Fault(line, "json", f"not valid JSON ({error.msg} at column {error.colno})", "write one object a line")
        ) from None
    if not isinstance(values, dict):
        raise RecordError(Fault(line, "json", f"expected an object, found {type(values).__name__}", "use {…}"))
    if not answers:
        values.setdefault("text_output", "")
    for name in ("text_input", "text_output"):
        if name not in values:
            raise RecordError(Fault(line, name, "missing", "add it as a string"))
        if not isinstance(values[name], str):
            raise RecordError(Fault(line, name, f"expected a string, found {values[name]!r}", "write it as a string"))
        if any("\ud800" <= character <= "\udfff" for character in values[name]):
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
    marks, images = record.text_input.count(IMAGE_MARK), len(record.image_input)
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


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of each line that is not blank."""
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, text


def scan(path: Path, answers: bool = True) -> tuple[list[Record], list[Fault]]:
    """Read a whole file; return the records that have the format and the faults of the others.

    Args:
        answers: see parse_record.

    Raises:
        UserError: the file is missing, not UTF-8, or holds no record.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of records")
    records: list[Record] = []
    faults: list[Fault] = []
    try:
        for line, text in read_lines(path):
            try:
                records.append(parse_record(text, line, answers))
            except RecordError as error:
                faults.append(error.fault)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if not records and not faults:
        raise UserError(f"{path}: holds no record; expected one JSON object a line")
    return records, faults


@dataclass(frozen=True)
class ImageFinder:
    """Finds a record's images: beside the file, under the image root, in the working directory."""

    folders: tuple[Path, ...]

    @classmethod
    def beside(cls, data_path: Path, image_root: Path | None) -> ImageFinder:
        """Make the finder of one records file."""
        return cls(tuple(f.resolve() for f in (data_path.parent, image_root, Path.cwd()) if f is not None))

    def find(self, record: Record, name: str, path: str) -> Path:
        """Return the image's place; RecordError that names every place looked at."""
        places = [Path(path)] if Path(path).is_absolute() else [folder / path for folder in self.folders]
        try:
            for place in places:
                if place.is_file():
                    return place
        except OSError as error:
            how = "write the path of a file, not the image itself"
            raise record.fault(name, f"{path[:60]!r}… is no path ({error.strerror})", how) from None
        looked = ", ".join(str(place) for place in dict.fromkeys(places))
        raise record.fault(name, f"no image {path!r}: looked for {looked}", "correct the path or give --image_root")

    def size(self, record: Record, name: str, path: str) -> tuple[int, int]:
        """Return (height, width) in pixels, from the header alone."""
        place = self.find(record, name, path)
        try:
            with Image.open(place) as image:
                width, height = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._broken(record, name, place, error) from None
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise record.fault(
                name, f"image {place} is {width}×{height}, a side ratio above {MAX_ASPECT}", "crop or replace it"
            )
        return height, width

    def load(self, record: Record, name: str, path: str) -> Image.Image:
        """Decode the image to RGB."""
        place = self.find(record, name, path)
        try:
            with Image.open(place) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._broken(record, name, place, error) from None

    @staticmethod
    def _broken(record: Record, name: str, place: Path, error: Exception) -> RecordError:
        return record.fault(name, f"image {place} cannot be decoded ({error})", "replace the file")


def _rows(path: str, digest: str) -> Iterator[dict[str, Any]]:
    """Yield the Arrow rows of a file that `scan` found without fault (`digest` only keys the cache)."""
    del digest
    for line, text in read_lines(Path(path)):
        record = parse_record(text, line)
        yield {
            "line": line,
            "text_input": record.text_input,
            "text_output": record.text_output,
            "image_input": list(record.image_input),
            "image_output": list(record.image_output),
            # Free-form keys have no common Arrow type, so they travel as JSON.
            "extra": json.dumps(record.extra),
        }


def open_records(path: Path, cache_dir: Path | None) -> Dataset:
    """Open a faultless records file as a memory-mapped Arrow dataset, one row a record, in file order."""
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
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return datasets.Dataset.from_generator(
        _rows,
        features=features,
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"path": str(path.resolve()), "digest": digest},
    )


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
