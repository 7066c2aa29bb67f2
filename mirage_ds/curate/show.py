"""`mirage-ds data show`: records as a page to look at, one HTML file with everything in it, or one PNG.

The answer has a numbered mark where each run of latents stands, with its helper image there.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

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


@dataclass(frozen=True)
class Shown:
    """One line of the file, ready to be drawn.

    Attributes:
        question, answer: texts and pictures in their order.
        keys: the record's other keys.
        faults: what `data check` would say, and what the record's task cannot read.
    """

    line: int
    question: list[str | Place]
    answer: list[str | Place]
    keys: dict[str, Any]
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
            return Shown(line, [], [text], {}, faults)
    before = "".join(f"{turn['role']}: {turn['content']}\n" for turn in record.turns_before)
    asked = f"{before}user: {record.text_input}" if before else record.text_input
    question = _laid(asked, IMAGE_MARK, _places(record, "image_input", record.image_input, finder, faults))
    helpers = _places(record, "image_output", record.image_output, finder, faults)
    answer = _laid(record.text_output, HELPER_MARK, helpers)
    faults += _task_faults(record)
    keys = {key: value for key, value in record.extra.items() if key != TURNS_BEFORE}
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


# ------------------------------------------------------------------------------------------------------------- HTML

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --soft: #8881; --latent: #b45f06; --fault: #c5221f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --latent: #f5b66a; --fault: #ff8a80; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
article {{ border-top: 1px solid var(--line); padding: 1rem 0; }}
h1 {{ font-size: 1.25rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1rem; margin: 0 0 .5rem; }}
h3 {{ font-size: .8rem; margin: 1rem 0 .25rem; opacity: .75; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.answer {{ background: var(--soft); padding: .5rem .75rem; border-radius: .25rem; }}
figure {{ display: inline-block; margin: .25rem .5rem .25rem 0; vertical-align: top; white-space: normal; }}
figure img {{ display: block; max-width: 18rem; max-height: 18rem; height: auto; }}
figcaption {{ font-size: .75rem; opacity: .75; max-width: 18rem; overflow-wrap: anywhere; }}
figure.latent {{ border: 2px solid var(--latent); padding: .25rem; }}
figure.latent figcaption {{ color: var(--latent); opacity: 1; }}
.keys {{ font: .8rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }}
.fault {{ color: var(--fault); }}
</style>
</head>
<body>
<h1>{title}</h1>
{articles}
</body>
</html>
"""


def html_page(title: str, records: Sequence[Shown]) -> str:
    """Return one self-contained page."""
    articles = "\n".join(_article(one) for one in records)
    return _PAGE.format(title=html.escape(title), articles=articles)


def _article(one: Shown) -> str:
    parts = [f'<article id="line{one.line}">\n<h2>line {one.line}</h2>']
    parts += [
        f'<p class="fault">{html.escape(f"{fault.field}: {fault.what}; {fault.how}")}</p>' for fault in one.faults
    ]
    if one.question:
        parts.append(f'<h3>question</h3>\n<div class="text">{_flow(one.question, "")}</div>')
    parts.append(f'<h3>answer</h3>\n<div class="text answer">{_flow(one.answer, "latent")}</div>')
    if one.keys:
        keys = "<br>".join(html.escape(f"{key}: {_value(value)}") for key, value in one.keys.items())
        parts.append(f'<h3>other keys</h3>\n<div class="keys">{keys}</div>')
    return "\n".join([*parts, "</article>"])


def _flow(parts: Sequence[str | Place], kind: str) -> str:
    return "".join(html.escape(part) if isinstance(part, str) else _figure(part, kind) for part in parts)


def _figure(place: Place, kind: str) -> str:
    caption = html.escape(f"{_label(kind, place.number)}: {place.caption}")
    image = ""
    if place.image:
        small = _shrunk(place.image, _HTML_SIDE)
        image = f'<img src="{_data_url(small)}" width="{small.width}" height="{small.height}" alt="{caption}">'
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    small = image.copy()
    small.thumbnail((side, side))
    return small


def _label(kind: str, number: int) -> str:
    return f"latents {number}" if kind else f"image {number}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data_url(image: Image.Image) -> str:
    """Return a picture as a data URL: PNG where few colours make that the smaller one, else JPEG."""
    best, kind = b"", ""
    for form, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 90, "subsampling": 0})):
        content = io.BytesIO()
        image.save(content, form, **options)
        if not best or len(content.getvalue()) < len(best):
            best, kind = content.getvalue(), form.lower()
    return f"data:image/{kind};base64,{base64.b64encode(best).decode()}"


# -------------------------------------------------------------------------------------------------------------- PNG

_WIDTH, _PAD, _LINE = 1200, 12, 18
_INK, _SOFT, _LATENT, _FAULT = (20, 20, 20), (120, 120, 120), (180, 95, 6), (197, 34, 31)


def png_sheet(records: Sequence[Shown]) -> Image.Image:
    """Draw the records one below the other, RGB, 1200 px wide."""
    blocks = [block for one in records for block in _blocks(one)]
    sheet = Image.new("RGB", (_WIDTH, sum(block.height for block in blocks) + 2 * _PAD), "white")
    top = _PAD
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def _blocks(one: Shown) -> Iterator[Image.Image]:
    yield _words(f"line {one.line}", _INK, rule=True)
    for fault in one.faults:
        yield _words(f"{fault.field}: {fault.what}; {fault.how}", _FAULT)
    for name, parts, kind in (("question", one.question, ""), ("answer", one.answer, "latent")):
        if parts:
            yield _words(name, _SOFT)
        row: list[Place] = []
        for part in parts:
            if isinstance(part, Place):
                row.append(part)
                continue
            if row and part.strip():
                yield _pictures(row, kind)
                row = []
            if part.strip():
                yield _words(part.strip("\n"), _INK)
        if row:
            yield _pictures(row, kind)
    if one.keys:
        yield _words("  ".join(f"{key}: {_value(value)}" for key, value in one.keys.items()), _SOFT)


def _font() -> Any:
    return ImageFont.load_default(14)


def _words(text: str, colour: tuple[int, int, int], rule: bool = False) -> Image.Image:
    """Draw a text, broken at the sheet's width."""
    font = _font()
    lines = [broken for line in text.split("\n") for broken in _broken(line, font, _WIDTH - 2 * _PAD)]
    block = Image.new("RGB", (_WIDTH, len(lines) * _LINE + 8 + 8 * rule), "white")
    pen = ImageDraw.Draw(block)
    if rule:
        pen.line([(0, 3), (_WIDTH, 3)], fill=_SOFT)
    for number, line in enumerate(lines):
        pen.text((_PAD, 4 + 8 * rule + number * _LINE), line, fill=colour, font=font)
    return block


def _broken(line: str, font: Any, width: int) -> Iterator[str]:
    """Break a line between words, and a word that is too long anywhere."""
    now = ""
    for word in re.findall(r"\s*\S{1,100}|\s+", line) or [""]:
        if now and font.getlength(now + word) > width:
            yield now
            now = ""
        now += word if now else word.lstrip()
    yield now


def _pictures(places: Sequence[Place], kind: str) -> Image.Image:
    """Draw pictures side by side, five a row, each with its label; latent places are framed."""
    shrunk = [place.image and _shrunk(place.image, _PNG_SIDE) for place in places]
    rows = [range(start, min(start + 5, len(places))) for start in range(0, len(places), 5)]
    heights = [max(image.height if image else _LINE for image in shrunk[row.start : row.stop]) for row in rows]
    block = Image.new("RGB", (_WIDTH, sum(heights) + (_LINE + 14) * len(rows)), "white")
    pen = ImageDraw.Draw(block)
    colour = _LATENT if kind else _SOFT
    top = _LINE + 4
    for row, height in zip(rows, heights, strict=True):
        for at in row:
            left, image = (at - row.start) * (_WIDTH // 5) + _PAD, shrunk[at]
            pen.text((left, top - _LINE - 4), _label(kind, places[at].number), fill=colour, font=_font())
            if image is None:
                pen.text((left, top), "no picture", fill=_FAULT, font=_font())
                continue
            block.paste(image, (left, top))
            pen.rectangle((left - 2, top - 2, left + image.width + 1, top + image.height + 1), outline=colour, width=2)
        top += height + _LINE + 14
    return block


# ------------------------------------------------------------------------------------------------------------- file


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
        content = html_page(file.name, records).encode("utf-8")
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
            text = "".join(
                part if isinstance(part, str) else f"[{_label(kind, part.number)}: {part.caption}]" for part in parts
            )
            lines += [text.strip(), ""] if text.strip() else []
        lines += [f"{key}: {_value(value)}" for key, value in one.keys.items()]
    return "\n".join(lines)
