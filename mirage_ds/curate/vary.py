"""`mirage-ds data vary`: the rival and placebo arms of a study on what a helper image's information is worth.

Each kind is a function of one record that returns the rows written for it, in the records' order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mirage_ds.curate.partners import choose_partners
from mirage_ds.curate.rewrite import Row, Source, named_task, write_rows
from mirage_ds.curate.spec import QUESTION, Kind, VarySpec
from mirage_ds.data.record import HELPER_MARK, IMAGE_MARK, TURNS_BEFORE, Record
from mirage_ds.errors import UserError, shown
from mirage_ds.tasks import get_task, task_name
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.report import Advance
from mirage_ds.tasks.write import Written, new_target

GREY = (128, 128, 128)
# Every other one is converted to RGB when it is read, so noise in RGB is the same to the model.
_NOISE_MODES = {"L": 1, "RGB": 3, "RGBA": 4}
# After these a helper is no longer what the record's keys say.
_FOREIGN = {"helper-swap", "helper-noise"}


@dataclass(frozen=True)
class Given:
    """What a kind makes its rows from.

    Attributes:
        row: the record as it is, its images found.
        partner: the record whose helpers it gets; only for helper-swap.
    """

    source: Source
    spec: VarySpec
    record: Record
    row: Row
    partner: Record | None = None


def vary(kind: Kind, file: Path, spec: VarySpec, progress: Advance | None = None) -> Written:
    """Write another records file, with the helper's information elsewhere, in part, or not at all.

    Args:
        progress: called with (pictures written, pictures in all).

    Raises:
        UserError: a record that lacks what the kind needs, a flag of another kind, a target that exists.
    """
    new_target(spec.out, spec.name)  # before the records are read
    _check_flags(kind, spec)
    source = Source.read(file, spec.image_root, spec.most)
    for record in source.records:
        with source.told(record):
            _check_images(kind, record)
    partners = choose_partners(source, spec.seed) if kind == "helper-swap" else None
    rows: list[Row] = []
    for place, record in enumerate(source.records):
        with source.told(record):
            partner = source.records[partners[place]] if partners else None
            made = MAKERS[kind](Given(source, spec, record, source.row(record), partner))
        before = record.extra.get("variant")
        variant = f"{before}+{kind}" if isinstance(before, str) else kind
        rows += [replace(row, extra=row.extra | {"variant": variant}) for row in made]
    return write_rows(rows, spec, progress)


def _check_flags(kind: Kind, spec: VarySpec) -> None:
    for flag, own in (("question", "helper-only"), ("task", "helper-text")):
        if getattr(spec, flag) is not None and kind != own:
            raise UserError(f"--{flag} goes with {own}, not with {kind}; leave it out")
    if spec.question is not None:
        try:
            spec.question.encode()
        except UnicodeEncodeError:
            raise UserError("--question: not UTF-8 text; type it in a UTF-8 terminal") from None
        if IMAGE_MARK in spec.question or not spec.question.strip():
            raise UserError(
                f"--question is {shown(spec.question)}; give a text without {IMAGE_MARK}, there is no image"
            )


def _check_images(kind: Kind, record: Record) -> None:
    if kind == "no-image":
        if not record.image_input:
            raise record.fault("image_input", "no-image needs an input image", "add its path, or leave the row out")
    elif not record.image_output:
        raise record.fault("image_output", f"{kind} needs a helper image", "add its path, or leave the row out")


def _without_helper(row: Row) -> Row:
    """Return the row as text: neither the helper nor its mark."""
    return replace(row, text_output=row.text_output.replace(HELPER_MARK, ""), helpers=())


def _helper_input(given: Given) -> list[Row]:
    """The helper as a further input image. Without marks images stand first, and so does it."""
    row, images = given.row, len(given.row.helpers)
    text = row.text_input + IMAGE_MARK * images if given.record.marks else row.text_input
    return [replace(_without_helper(row), text_input=text, inputs=row.inputs + row.helpers)]


def _helper_rows(given: Given) -> list[Row]:
    """The row without its helper, and the row that sees it."""
    return [_without_helper(given.row), *_helper_input(given)]


def _helper_text(given: Given) -> list[Row]:
    """What the helper shows, in words where it stood."""
    record = given.record
    if len(record.image_output) > 1:
        raise record.fault("image_output", "helper-text needs exactly one helper image", "leave the row out")
    variant = str(record.extra.get("variant", ""))
    if _FOREIGN & set(variant.split("+")):
        raise record.fault("variant", f"{variant}: its helper is not its own", "take the records it was made from")
    name = named_task(record, given.spec.task)
    if not name:
        raise record.fault("task", "missing", "add its name, or give --task")
    try:
        words = get_task(name).helper_text({**record.extra, "text_output": record.text_output})
    except KeyError as error:
        how = f"add it: {task_name(name)} tells its helper by it"
        raise record.fault(str(error.args[0]), "missing", how) from None
    before, mark, after = record.text_output.partition(HELPER_MARK)
    if not mark:
        before, after = "", before
    parts = [before, words, after]
    text = parts[0]
    for part in parts[1:]:
        # Words do not run into their neighbours; what stood apart stays as it was.
        apart = not text or not part or text[-1].isspace() or part[0].isspace()
        text += part if apart else f" {part}"
    return [replace(given.row, text_output=text, helpers=())]


def _helper_swap(given: Given) -> list[Row]:
    """Another record's helpers."""
    assert given.partner is not None
    return [replace(given.row, helpers=given.source.row(given.partner).helpers)]


def _helper_noise(given: Given) -> list[Row]:
    """Noise of the helpers' sizes."""
    pictures = tuple(_noise(given, number, path) for number, path in enumerate(given.record.image_output))
    return [replace(given.row, helpers=pictures)]


def _noise(given: Given, number: int, path: str) -> Picture:
    finder, record = given.source.finder, given.record
    height, width = finder.size(record, "image_output", path)
    with Image.open(finder.find(record, "image_output", path)) as image:
        mode = image.mode if image.mode in _NOISE_MODES else "RGB"
    drawn = f"{given.spec.seed}/noise/{record.line}/{number}/{mode}/{width}x{height}"
    digest = hashlib.sha256(drawn.encode()).hexdigest()[:16]
    values = width * height * _NOISE_MODES[mode]
    return Picture.drawn(
        f"noise/{digest[:2]}/{digest}",
        lambda: Image.frombytes(mode, (width, height), random.Random(drawn).randbytes(values)),
    )


def _no_image(given: Given) -> list[Row]:
    """Grey pictures of the input images' sizes."""
    return [replace(given.row, inputs=tuple(_grey(given, path) for path in given.record.image_input))]


def _grey(given: Given, path: str) -> Picture:
    height, width = given.source.finder.size(given.record, "image_input", path)
    return Picture.drawn(f"grey/{width}x{height}", lambda: Image.new("RGB", (width, height), GREY))


def _helper_only(given: Given) -> list[Row]:
    """Nothing but the latents to read the answer from."""
    question = QUESTION if given.spec.question is None else given.spec.question
    extra = {key: value for key, value in given.row.extra.items() if key != TURNS_BEFORE}
    return [replace(given.row, text_input=question, inputs=(), extra=extra)]


MAKERS: dict[Kind, Callable[[Given], list[Row]]] = {
    "helper-input": _helper_input,
    "helper-rows": _helper_rows,
    "helper-text": _helper_text,
    "helper-swap": _helper_swap,
    "helper-noise": _helper_noise,
    "no-image": _no_image,
    "helper-only": _helper_only,
}
