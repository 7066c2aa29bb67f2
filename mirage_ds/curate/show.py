"""`mirage-ds data show`: records as a page to look at, one HTML file with everything in it, or one PNG.

The answer has a numbered mark where each latent block stands, with its helper image there.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import HELPER_MARK, IMAGE_MARK, TURNS_BEFORE, Fault, Record, RecordError, parse_record
from mirage_ds.data.record_files import read_lines
from mirage_ds.errors import UserError, shown
from mirage_ds.files import write_atomically
from mirage_ds.tasks import TASKS, get_task

# Rows shown where nobody says which.
FIRST = 20
# px of the longer side; larger pictures are shrunk, so that a page of many photographs still opens.
_HTML_SIDE, _PNG_SIDE = 640, 224
_ROWS = re.compile(r"(\d+)(?:-(\d+))?")
# px of a sheet, of the space at its edges and between pictures, and of a line of text.
_WIDTH, _PAD, _LINE = 1200, 12, 18
_INK, _SOFT, _LATENT, _FAULT = "#141414", "#787878", "#b45f06", "#c5221f"


@dataclass(frozen=True)
class Place:
    """Where a picture stands in a text.

    Attributes:
        number: from 1, among the marks of its text.
        image: None where there is none, or none that can be decoded.
        caption: its path, or why it is not there.
    """

    number: int
    image: Image.Image | None
    caption: str

    def label(self, kind: str) -> str:
        """Name it by its number; `kind` is that of the text, "" or "latent"."""
        return f"{'latents' if kind else 'image'} {self.number}"


@dataclass(frozen=True)
class Shown:
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
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else 0
        if first < 1 or last < first:
            raise UserError(f"--rows {text}: {shown(part)} is no line or range of lines; write it like 1,5-8")
        lines |= set(range(first, last + 1))
    return lines


def read_shown(file: Path, rows: str | None, image_root: Path | None) -> list[Shown]:
    """Read lines of a records file with their pictures.

    Args:
        rows: line numbers, as `parse_rows` reads them; the first records for None.

    Raises:
        UserError: no such file, no such line.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file of records; check the path")
    wanted = parse_rows(rows) if rows else None
    finder = ImageFinder.beside(file, image_root)
    found: list[Shown] = []
    for line, text in read_lines(file):
        if wanted is None and len(found) == FIRST:
            break
        if wanted is None or line in wanted:
            found.append(_shown(text, line, finder))
    missing = sorted((wanted or set()) - {one.line for one in found})
    if missing or not found:
        what = f"no record on line {missing[0]}" if missing else "no record"
        raise UserError(f"{file}: there is {what}; look for others with --rows")
    return found


def _shown(text: str, line: int, finder: ImageFinder) -> Shown:
    faults: list[Fault] = []
    try:
        record = parse_record(text, line)
    except RecordError as error:
        faults.append(error.fault)
        try:
            # What is wrong with its answer does not keep its question from being shown.
            record = parse_record(text, line, answers=False)
        except RecordError:
            return Shown(line, [], [text], [], faults)
    before = "".join(f"{turn['role']}: {turn['content']}\n" for turn in record.turns_before)
    asked = f"{before}user: {record.text_input}" if before else record.text_input
    question = _laid(asked, IMAGE_MARK, _places(record, "image_input", record.image_input, finder, faults))
    helpers = _places(record, "image_output", record.image_output, finder, faults)
    answer = _laid(record.text_output, HELPER_MARK, helpers)
    faults += _task_faults(record)
    keys = [
        f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in record.extra.items()
        if key != TURNS_BEFORE
    ]
    return Shown(line, question, answer, keys, faults)


def _places(record: Record, name: str, paths: Sequence[str], finder: ImageFinder, faults: list[Fault]) -> list[Place]:
    places = []
    for number, path in enumerate(paths, 1):
        try:
            places.append(Place(number, finder.load(record, name, path), path))
        except RecordError as error:
            faults.append(error.fault)
            places.append(Place(number, None, f"{path}: {error.fault.what}"))
    return places


def _laid(text: str, mark: str, places: list[Place]) -> list[str | Place]:
    """Put the pictures where their marks stand; without a mark they stand first."""
    parts = text.split(mark)
    if len(parts) == 1:
        return [*places, text]
    laid: list[str | Place] = [parts[0]]
    for number, part in enumerate(parts[1:], 1):
        laid.append(places[number - 1] if number <= len(places) else Place(number, None, "no picture"))
        laid.append(part)
    return [part for part in laid if part != ""]


def _task_faults(record: Record) -> list[Fault]:
    """Say when the record's task reads no answer out of its own; a task of somebody's own is not imported for that."""
    name = record.extra.get("task")
    if name not in TASKS or not record.text_output:
        return []
    known = {**record.extra, "text_output": record.text_output}
    try:
        answered = get_task(name).parse(record.text_output, known) is not None
    except KeyError as error:
        return [Fault(record.line, str(error.args[0]), f"missing, and {name} reads answers by it", "add it")]
    if answered:
        return []
    return [Fault(record.line, "text_output", f"{name} reads no answer out of it", "put the answer into \\boxed{}")]


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


def html_page(title: str, records: Sequence[Shown]) -> str:
    """Return one self-contained page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.filters |= {"shrunk": _shrunk, "data_url": _data_url}
    template = Path(__file__).with_name("show.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, records=records)


def png_sheet(records: Sequence[Shown]) -> Image.Image:
    """Draw the records, RGB, 1200 px wide: words and pictures from left to right, as on the page."""
    placed: list[tuple[Image.Image, tuple[int, int]]] = []
    x, y, height = _PAD, _PAD, _LINE
    for box in (box for one in records for box in _boxes(one)):
        if box is None or x + box.width > _WIDTH - _PAD:
            x, y, height = _PAD, y + height, _LINE
        if box is not None:
            placed.append((box, (x, y)))
            x, height = x + box.width, max(height, box.height)
    sheet = Image.new("RGB", (_WIDTH, y + height + _PAD), "white")
    for box, at in placed:
        sheet.paste(box, at)
    return sheet


def _boxes(one: Shown) -> Iterator[Image.Image | None]:
    """Yield words and pictures as small pictures of their own, and None where a line ends."""
    yield from _words(f"line {one.line}\n", _SOFT)
    for fault in one.faults:
        yield from _words(f"{fault.field}: {fault.what}; {fault.how}\n", _FAULT)
    for name, parts, kind in (("question", one.question, ""), ("answer", one.answer, "latent")):
        yield from _words(f"{name}\n", _SOFT)
        for part in parts:
            yield from _words(part, _INK) if isinstance(part, str) else [_figure(part, kind)]
        yield None
    yield from _words("\n".join([*one.keys, "", ""]), _SOFT)


def _words(text: str, colour: str) -> Iterator[Image.Image | None]:
    # Longer words are broken anywhere.
    for word in re.findall(r"\n|[^\S\n]+|\S{1,80}", text):
        yield None if word == "\n" else _drawn(word, colour)


_font = cache(ImageFont.load_default)


def _drawn(text: str, colour: str) -> Image.Image:
    font = _font(14)
    box = Image.new("RGB", (math.ceil(font.getlength(text)), _LINE), "white")
    ImageDraw.Draw(box).text((0, 0), text, fill=colour, font=font)
    return box


def _figure(place: Place, kind: str) -> Image.Image:
    """Draw a picture in a frame below its label."""
    colour = _LATENT if kind else _SOFT
    label = _drawn(place.label(kind), colour)
    inner = _shrunk(place.image, _PNG_SIDE) if place.image else _drawn("no picture", _FAULT)
    framed = ImageOps.expand(inner.convert("RGB"), 2, colour)
    box = Image.new("RGB", (max(label.width, framed.width) + 2 * _PAD, _LINE + framed.height + _PAD), "white")
    box.paste(label, (_PAD, 0))
    box.paste(framed, (_PAD, _LINE))
    return box


def write_page(file: Path, records: Sequence[Shown], out: Path) -> None:
    """Write the records to `out`, a page or, where it ends so, a PNG; never over another file.

    Raises:
        UserError: it exists, or cannot be written.
    """
    if out.suffix not in (".html", ".png"):
        raise UserError(f"--out {out}: is neither .html nor .png; call it one of them")
    if out.exists():
        raise UserError(f"--out {out}: exists; remove it, or choose another name")
    if out.suffix == ".png":
        drawn = io.BytesIO()
        png_sheet(records).save(drawn, "PNG")
        content = drawn.getvalue()
    else:
        # Half a surrogate pair can stand in a record, and in no file.
        content = html_page(file.name, records).encode("utf-8", "backslashreplace")
    try:
        write_atomically(out, content)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another place") from None


def as_text(records: Sequence[Shown]) -> str:
    """Return the records as plain text, the pictures as [image 1: path] and [latents 1: path]."""
    lines: list[str] = []
    for one in records:
        lines.append(f"── line {one.line} " + "─" * 60)
        lines += [f"FAULT {fault.field}: {fault.what}; {fault.how}" for fault in one.faults]
        for parts, kind in ((one.question, ""), (one.answer, "latent")):
            text = "".join(part if isinstance(part, str) else f"[{part.label(kind)}: {part.caption}]" for part in parts)
            lines += [text.strip(), ""] if text.strip() else []
        lines += one.keys
    return "\n".join(lines)
