"""The record: one JSON line in the public format, and its checks.

    text_input    the question, with an `<image>` mark where each input image stands (no mark: images first)
    text_output   the answer, with an `<output_image>` mark where the latents stand (no mark: first in the answer)
    image_input   a path or a list of paths (or what inside.py reads)
    image_output  the helper image: a path, or a list for several latent blocks; may be absent
    region        a box of the first input image, in place of a helper (region.py); may be absent

or a row as others have it (layouts.py): `messages`, another trainer's layout, the user's own columns. `turns_before`
holds the messages before the question. Other keys are kept as they are.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mirage_ds.config.columns import RECOGNISED, Columns
from mirage_ds.data import messages
from mirage_ds.data.inside import folder_of_pictures, path_of
from mirage_ds.data.layouts import Row, read_row
from mirage_ds.data.messages import FIELDS, HELPER_MARK, IMAGE_MARK, TURNS_BEFORE, MessageError, is_null
from mirage_ds.errors import UserError, is_text, shown, strict_json

# What is wrong with records of which not one has a latent block in stage2, and how to fix it.
NO_LATENTS = (
    f"stage2 trains latents, and no record has any (a helper image, or {HELPER_MARK} in the answer)",
    "name the helpers' column by --columns helper=…, or train in sft",
)
# Where null means as much as nothing.
NULLABLE = (*FIELDS, "messages", TURNS_BEFORE)
# Python's own limit depends on who calls the parser, and a line must be a fault for all or for none.
MAX_DEPTH = 64


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one record: where, what, and how to fix it.

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


def name_file(fault: Fault, files: Sequence[Path], number: int) -> Fault:
    """Put the file into a fault where there are several."""
    return fault if len(files) == 1 else replace(fault, file=str(files[number]))


class RecordError(Exception):
    """A record that cannot be used; carries its Fault."""

    def __init__(self, fault: Fault):
        super().__init__(str(fault))
        self.fault = fault


@contextmanager
def blamed(where: str) -> Iterator[None]:
    """Turn a record's fault into a user's error; `where` stands before the fault."""
    try:
        yield
    except RecordError as error:
        raise UserError(f"{where}{error.fault}") from None


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
        """Number of latent blocks in the answer: one per mark, or one for an unmarked helper image."""
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

    def need_helper(self, stage: str = "stage1") -> None:
        """RecordError unless there is a helper image, which a stage of config.run.HELPED takes its targets from."""
        if not self.image_output:
            how = "add its path, or name its column by --columns helper=…, or train this row in sft, or in stage2 with "
            raise self.fault("image_output", f"{stage} needs a helper image", f"{how}{HELPER_MARK} in the answer")

    def fault(self, name: str, what: str, how: str) -> RecordError:
        """Make the error that names this record's line."""
        return RecordError(Fault(self.line, name, what, how))


def _paths(value: Any, name: str, pictures: Path | None) -> tuple[str, ...]:
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    try:
        found = [path_of(item, pictures or folder_of_pictures()) for item in values]
    except ValueError as error:
        raise MessageError(name, f"a picture {error}", "write it as a file, and its path here") from None
    if found == [None]:
        return ()
    how = "write the image's path"
    for item in found:
        if not isinstance(item, str) or not item:
            raise MessageError(name, f"expected a path or a list of paths, found {shown(item)}", how)
        if "\0" in item or not is_text(item):
            raise MessageError(name, f"{shown(item)} can be no path", how)
    return tuple(found)


def parse_object(text: str, line: int) -> dict[str, Any]:
    """Parse the JSON object of one line; RecordError where it holds none."""

    def wrong(what: str, how: str) -> RecordError:
        return RecordError(Fault(line, "json", what, how))

    too_deep = wrong(f"more than {MAX_DEPTH} levels of lists and objects", "write a flat object")
    try:
        text.encode("utf-8")
        # A line that is cut off is to be blamed at its own end, not at column 1 of the next.
        values = strict_json(text.removesuffix("\n"))
    except UnicodeEncodeError as error:
        # flat.json_lines lets a byte that is not UTF-8 through as half a surrogate pair, so that its line can be named.
        place = len(text[: error.start].encode("utf-8")) + 1
        what = f"not UTF-8 text (byte 0x{ord(text[error.start]) & 0xFF:02x} at place {place} of the line)"
        raise wrong(what, "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise wrong(f"not valid JSON ({error.msg} at column {error.colno})", "write one object a line") from None
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise wrong(str(error), "write each key once and finite numbers") from None
    if not isinstance(values, dict):
        raise wrong(f"expected an object, found {type(values).__name__}", "use {…}")
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in level if isinstance(item, (dict, list))]
    if level:
        raise too_deep
    return values


def make_record(
    row: str | Row, line: int, answers: bool = True, pictures: Path | None = None, columns: Columns = RECOGNISED
) -> Record:
    """Make a record of a JSON line, or of a row's keys and values; RecordError when it does not have the format.

    Args:
        row: in the public format, in another layout, or with the user's own columns (layouts.py).
        answers: whether the record must have an answer; questions alone are enough to decode.
        pictures: where pictures that stand in the record are written; a folder of the user's cache if None.
    """
    values = parse_object(row, line) if isinstance(row, str) else row
    # A row of a table has every column of its file: what it lacks is null there.
    of_table = not isinstance(row, str) and "text_input" in row
    values = {key: value for key, value in values.items() if not ((of_table or key in NULLABLE) and is_null(value))}
    try:
        values, _ = read_row(values, columns, answers)
        if TURNS_BEFORE in values:
            values[TURNS_BEFORE] = messages.check_turns(values[TURNS_BEFORE])
        if not answers:
            values.setdefault("text_output", "")
        for name in ("text_input", "text_output"):
            if name not in values:
                raise MessageError(name, "missing", "add it as a string")
            messages.expect(values[name], str, name)
        images, helpers = (_paths(values.get(name), name, pictures) for name in ("image_input", "image_output"))
        extra = {key: value for key, value in values.items() if key not in FIELDS}
        record = Record(line, values["text_input"], values["text_output"], images, helpers, extra)
    except MessageError as error:
        raise RecordError(Fault(line, error.field, error.what, error.how)) from None
    before = [(TURNS_BEFORE, turn["content"]) for turn in record.turns_before]
    for name, text in [*before, ("text_input", record.text_input), ("text_output", record.text_output)]:
        if not is_text(text):
            raise record.fault(name, "holds half a surrogate pair", "write both halves, or the character itself")
    check_marks(record, answers)
    return record


def check_marks(record: Record, answers: bool) -> None:
    """RecordError where marks stand in the wrong text, or are not as many as the images."""
    if HELPER_MARK in record.text_input:
        raise record.fault("text_input", f"holds {HELPER_MARK}", "latents stand in the answer; write it there")
    if answers and IMAGE_MARK in record.text_output:
        how = f"input images stand in the question, helpers as {HELPER_MARK}"
        raise record.fault("text_output", f"holds {IMAGE_MARK}", how)
    marks, count = record.marks, len(record.image_input)
    if marks and marks != count:
        what = f"{marks} {IMAGE_MARK} mark(s) for {count} image(s)"
        raise record.fault("text_input", what, "write one mark for each image, or none (images then stand first)")
    if not answers:
        return
    marks, helpers = record.text_output.count(HELPER_MARK), len(record.image_output)
    if helpers and marks != helpers and not (marks == 0 and helpers == 1):
        what = f"{marks} {HELPER_MARK} mark(s) for {helpers} helper image(s)"
        raise record.fault("text_output", what, "write one mark for each helper")
    if not record.text_output.replace(HELPER_MARK, "").strip():
        raise record.fault("text_output", "empty answer", "write the answer that the model is to learn")


def to_json(record: Record) -> str:
    """Write a Record as the index holds it."""
    # Parquet has values that JSON lacks (dates).
    return json.dumps(asdict(record), default=str)


def from_json(text: str) -> Record:
    """Read what to_json wrote."""
    values = json.loads(text)
    paths = {name: tuple(values[name]) for name in ("image_input", "image_output")}
    return Record(**values | paths)
