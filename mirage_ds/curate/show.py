"""`mirage-ds data show`: records as a page to look at, one HTML file with everything in it, or one PNG.

The answer has a numbered mark where each latent block stands, with its helper image there.
"""

import base64
import io
import json
import math
import re
import textwrap
from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mirage_ds.config.columns import RECOGNISED, Columns
from mirage_ds.data.images import ImageFinder, png_of
from mirage_ds.data.record import HELPER_MARK, IMAGE_MARK, TURNS_BEFORE, Fault, Record, RecordError, make_record
from mirage_ds.data.record_files import Raw, places, told
from mirage_ds.errors import UserError, shown
from mirage_ds.files import write_atomically
from mirage_ds.tasks import TASKS, get_task, seen_by_scorer

# Rows shown where nobody says which.
FIRST = 20
# px of the longer side; larger pictures are shrunk, so that a page of many photographs still opens.
_HTML_SIDE, _PNG_SIDE = 640, 216
# Of a sheet: pictures in a row, px at the edges and between pictures, characters in a line of text.
_PICTURES, _PAD, _COLUMNS = 5, 20, 120
_ROWS = re.compile(r"(\d+)(?:-(\d+))?")


class Place(NamedTuple):
    """Where a picture stands in a text.

    Attributes:
        label: "image 1" or "latents 1": what it is, and its number among the marks of its text.
        image: None where there is none, or none that can be decoded.
        caption: its path, or why it is not there.
    """

    label: str
    image: Image.Image | None
    caption: str


class Shown(NamedTuple):
    """One line of the file, ready to be drawn.

    Attributes:
        question, answer: texts and pictures in their order.
        keys: the record's other keys and their values, a line each.
        faults: what `data check` would say, and what the record's task cannot read.
    """

    line: int
    question: list[str | Place]
    answer: list[str | Place]
    keys: list[str]
    faults: list[Fault]


def parse_rows(text: str) -> set[int]:
    """Read "1,5-8" as {1, 5, 6, 7, 8}.

    Raises:
        UserError: it is something else, or holds no line.
    """
    lines: set[int] = set()
    for part in text.split(","):
        match = _ROWS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"--rows {text}: {shown(part)} is no line or range of lines; write it like 1,5-8")
        lines |= set(range(first, last + 1))
    return lines


def read_shown(file: Path, rows: str | None, image_root: Path | None, columns: Columns = RECOGNISED) -> list[Shown]:
    """Read lines of a file or folder of records with their pictures.

    Args:
        rows: line numbers, of several files places among all records, as `parse_rows` reads them; the first records
            for None.

    Raises:
        UserError: no such file, no such line.
    """
    wanted = parse_rows(rows) if rows else set()
    for said in told(file, columns):
        click.echo(said, err=True)
    finder = ImageFinder.beside(file, image_root)
    chosen = (place for place in places(file) if not wanted or place.number in wanted)
    found = [_shown(one.row, one.number, finder, columns) for one in islice(chosen, None if wanted else FIRST)]
    missing = sorted(wanted - {one.line for one in found})
    if missing or not found:
        what = f"no record on line {missing[0]}" if missing else "no record"
        raise UserError(f"{file}: there is {what}; look for others with --rows")
    return found


def _shown(row: Raw, line: int, finder: ImageFinder, columns: Columns) -> Shown:
    faults: list[Fault] = []
    try:
        record = make_record(row, line, columns=columns)
    except RecordError as error:
        faults.append(error.fault)
        try:
            # What is wrong with its answer does not keep its question from being shown.
            record = make_record(row, line, answers=False, columns=columns)
        except RecordError:
            return Shown(line, [], [row if isinstance(row, str) else shown(row, 2000)], [], faults)
    before = "".join(f"{turn['role']}: {turn['content']}\n" for turn in record.turns_before)
    asked = f"{before}user: {record.text_input}" if before else record.text_input
    question = _laid(asked, record, "image_input", finder, faults)
    answer = _laid(record.text_output, record, "image_output", finder, faults)
    faults += _task_faults(record)
    extra = {key: value for key, value in record.extra.items() if key != TURNS_BEFORE}
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in extra.values()]
    keys = [f"{key}: {text}" for key, text in zip(extra, texts, strict=True)]
    return Shown(line, question, answer, keys, faults)


def _laid(text: str, record: Record, field: str, finder: ImageFinder, faults: list[Fault]) -> list[str | Place]:
    """Put a field's pictures where their marks stand; without a mark they stand first."""
    mark, what = {"image_input": (IMAGE_MARK, "image"), "image_output": (HELPER_MARK, "latents")}[field]
    head, *parts = text.split(mark)
    places = []
    for number, (path, _) in enumerate(zip_longest(getattr(record, field), parts), 1):
        image, caption = None, path or "no picture"
        try:
            image = finder.load(record, field, path) if path else None
        except RecordError as error:
            faults.append(error.fault)
            caption = f"{path}: {error.fault.what}"
        places.append(Place(f"{what} {number}", image, caption))
    if not parts:
        return [*places, text]
    laid = [head, *(one for pair in zip(places, parts, strict=False) for one in pair)]
    return [part for part in laid if part != ""]


def _task_faults(record: Record) -> list[Fault]:
    """Say when the record's task reads no answer out of its own; a task of somebody's own is not imported for that."""
    name = record.extra.get("task")
    if name not in TASKS or not record.text_output:
        return []
    unread = Fault(record.line, "text_output", f"{name} reads no answer out of it", "put the answer into \\boxed{}")
    try:
        return [unread] if get_task(name).parse(record.text_output, seen_by_scorer(record)) is None else []
    except KeyError as error:
        return [Fault(record.line, str(error.args[0]), f"missing, and {name} reads answers by it", "add it")]


def _shrunk(image: Image.Image, side: int = _HTML_SIDE) -> Image.Image:
    small = image.copy()
    small.thumbnail((side, side))
    return small


def _data_url(image: Image.Image) -> str:
    """Return a picture as a data URL: PNG where it has few colours, else JPEG, which is smaller."""
    kind = "png" if image.getcolors() else "jpeg"
    content = io.BytesIO()
    image.save(content, kind, quality=90, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def html_page(title: str, records: Sequence[Shown]) -> bytes:
    """Return one self-contained page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.filters |= {"shrunk": _shrunk, "data_url": _data_url}
    template = Path(__file__).with_name("show.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(title=title, records=records)
    # Half a surrogate pair can stand in a record, and in no file.
    return page.encode("utf-8", "backslashreplace")


def png_sheet(records: Sequence[Shown]) -> bytes:
    """Draw the records, RGB, 1200 px wide: the text of each, as `as_text` has it, and below it its pictures."""
    font, step = ImageFont.load_default(14), _PNG_SIDE + _PAD
    rows: list[Image.Image] = []
    for one in records:
        text = as_text([one]).replace("─", "-")
        lines = "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, _COLUMNS) or [""])
        height = math.ceil(ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), lines, font)[3])
        rows.append(Image.new("RGB", (_PAD + _PICTURES * step, height + 2 * _PAD), "white"))
        ImageDraw.Draw(rows[-1]).multiline_text((_PAD, _PAD), lines, "black", font)
        parts = (part for part in (*one.question, *one.answer) if isinstance(part, Place))
        for at, (label, image) in enumerate((part.label, part.image) for part in parts if part.image):
            left = _PAD + at % _PICTURES * step
            if left == _PAD:
                rows.append(Image.new("RGB", (rows[0].width, _PNG_SIDE + 2 * _PAD), "white"))
            ImageDraw.Draw(rows[-1]).text((left, 0), label, "black", font)
            rows[-1].paste(_shrunk(image, _PNG_SIDE), (left, 20))
    return png_of(Image.fromarray(np.concatenate([np.asarray(row) for row in rows])))


def write_page(file: Path, records: Sequence[Shown], out: Path) -> None:
    """Write the records to `out`, a page or, where it ends so, a PNG; never over another file.

    Raises:
        UserError: it exists, or is of another kind.
    """
    if out.suffix not in (".html", ".png"):
        raise UserError(f"--out {out}: is neither .html nor .png; call it one of them")
    if out.exists():
        raise UserError(f"--out {out}: exists; remove it, or choose another name")
    write_atomically(out, png_sheet(records) if out.suffix == ".png" else html_page(file.name, records))


def as_text(records: Sequence[Shown]) -> str:
    """Return the records as plain text, the pictures as [image 1: path] and [latents 1: path]."""
    lines: list[str] = []
    for one in records:
        lines.append(f"── line {one.line} " + "─" * 60)
        lines += [f"FAULT {fault.field}: {fault.what}; {fault.how}" for fault in one.faults]
        for parts in (one.question, one.answer):
            text = "".join(part if isinstance(part, str) else f"[{part.label}: {part.caption}]" for part in parts)
            lines += [text.strip(), ""] if text.strip() else []
        lines += one.keys
    return "\n".join(lines)
