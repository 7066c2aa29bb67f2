"""`mirage-ds data vary`: the rival and placebo arms of a study on what a helper image's information is worth.

Each kind is a function of one record that returns the rows written for it, in the records' order.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mirage_ds.curate.rewrite import Source
from mirage_ds.curate.spec import Kind, VarySpec
from mirage_ds.data.images import Key
from mirage_ds.data.record import HELPER_MARK, IMAGE_MARK, TURNS_BEFORE, Record
from mirage_ds.errors import UserError, is_text, shown
from mirage_ds.tasks import get_task, level_of, named_task
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.write import Row, Written, new_target, write_rows

GREY = (128, 128, 128)
# After these a helper is no longer what the record's keys say.
_FOREIGN = {"helper-swap", "helper-noise"}


class Given(NamedTuple):
    """What a kind makes its rows from.

    Attributes:
        row: the record as it is, its images found.
        partner: the record whose helpers it gets with helper-swap; itself with other kinds.
    """

    source: Source
    spec: VarySpec
    record: Record
    row: Row
    partner: Record


def vary(kind: Kind, file: Path, spec: VarySpec) -> Written:
    """Write another records file, with the helper's information elsewhere, in part, or not at all.

    Raises:
        UserError: a record that lacks what the kind needs, a flag of another kind, a target that exists.
    """
    new_target(spec)  # before the records are read
    _check_flags(kind, spec)
    source = Source.read(file, spec, spec.most)
    for record in source.records:
        with source.told(record):
            _check_images(kind, record)
    partners = choose_partners(source, spec.seed) if kind == "helper-swap" else source.records
    rows: list[Row] = []
    for record, partner in zip(source.records, partners, strict=True):
        given = Given(source, spec, record, source.row(record), partner)
        with source.told(record):
            made = MAKERS[kind](given)
        before = record.extra.get("variant")
        variant = f"{before}+{kind}" if isinstance(before, str) else kind
        rows += [row._replace(extra=row.extra | {"variant": variant}) for row in made]
    return write_rows(rows, spec)


def _check_flags(kind: Kind, spec: VarySpec) -> None:
    for flag, own in (("question", "helper-only"), ("task", "helper-text")):
        if flag in spec.model_fields_set and kind != own:
            raise UserError(f"--{flag} goes with {own}, not with {kind}; leave it out")
    if not is_text(spec.question):
        raise UserError("--question: not UTF-8 text; type it in a UTF-8 terminal")
    if IMAGE_MARK in spec.question or not spec.question.strip():
        raise UserError(f"--question is {shown(spec.question)}; give a text without {IMAGE_MARK}, there is no image")


def _check_images(kind: Kind, record: Record) -> None:
    if kind == "no-image":
        if not record.image_input:
            raise record.fault("image_input", "no-image needs an input image", "add its path, or leave the row out")
    elif not record.image_output:
        raise record.fault("image_output", f"{kind} needs a helper image", "add its path, or leave the row out")


def derange(labels: Sequence[Hashable], rng: random.Random) -> list[int] | None:
    """Draw a permutation that gives no place a label like its own.

    All labels different, it is a random cycle. Otherwise equal labels stand side by side in an order of chance, which
    is turned by as many places as the commonest label has.

    Returns:
        For each place the place it gets; None where more than half of the labels are equal, so that there is none.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place in rng.sample(range(len(labels)), len(labels)):
        members[labels[place]].append(place)
    order = [place for places in members.values() for place in places]
    turn = max(map(len, members.values()), default=0)
    if 2 * turn > len(order):
        return None
    return [other for _, other in sorted(zip(order, order[turn:] + order[:turn], strict=True))]


def choose_partners(source: Source, seed: int) -> list[Record]:
    """Choose for each record another one of its level with as many helpers, and with another content in them.

    Raises:
        UserError: a level has no partner for each of its records. Records without a level are of one level together.
    """
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    contents: list[tuple[Key, ...]] = []
    for place, record in enumerate(source.records):
        with source.told(record):
            groups[level_of(record), len(record.image_output)].append(place)
            # Pictures of one content are no swap, whatever they are called.
            contents.append(tuple(source.finder.key(record, "image_output", path) for path in record.image_output))
    found = list(source.records)
    for (level, helpers), places in sorted(groups.items()):
        own = [contents[place] for place in places]
        chosen = derange(own, random.Random(f"{seed}/swap/{level}/{helpers}"))
        if chosen is None:
            what = "the file" if level == "?" else f"level {level}"
            what += f" with {helpers} helpers" if helpers > 1 else ""
            trouble = f"{max(Counter(own).values())} of the {len(places)} records of {what} have one helper"
            if len(places) == 1:
                trouble = f"the record on line {source.records[places[0]].line} is the only one of {what}"
            how = "there is no other for each; give more records of them, or leave it out"
            raise UserError(f"{source.file}: helper-swap: {trouble}, so {how}")
        for place, other in zip(places, chosen, strict=True):
            found[place] = source.records[places[other]]
    return found


def _without_helper(row: Row) -> Row:
    """Return the row as text: neither the helper nor its mark."""
    return row._replace(text_output=row.text_output.replace(HELPER_MARK, ""), helpers=())


def _helper_input(given: Given) -> list[Row]:
    """The helper as a further input image. Without marks images stand first, and so does it."""
    row, images = given.row, len(given.row.helpers)
    text = row.text_input + IMAGE_MARK * images if given.record.marks else row.text_input
    return [_without_helper(row)._replace(text_input=text, inputs=row.inputs + row.helpers)]


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
        raise record.fault(str(error.args[0]), "missing", f"add it: {name} tells its helper by it") from None
    before, mark, after = record.text_output.partition(HELPER_MARK)
    text = _joined(_joined(before, words), after) if mark else _joined(words, before)
    return [given.row._replace(text_output=text, helpers=())]


def _joined(before: str, after: str) -> str:
    """Join two texts so that words do not run into their neighbours; what stood apart stays as it was."""
    apart = not before or not after or before[-1].isspace() or after[0].isspace()
    return before + after if apart else f"{before} {after}"


def _helper_noise(given: Given) -> list[Row]:
    """Noise of the helpers' sizes."""

    def noise(number: int, path: str) -> Picture:
        height, width = given.source.finder.size(given.record, "image_output", path)
        drawn = f"{given.spec.seed}/noise/{given.record.line}/{number}/RGB/{width}x{height}"
        digest = hashlib.sha256(drawn.encode()).hexdigest()[:16]
        return Picture.drawn(
            f"noise/{digest[:2]}/{digest}",
            lambda: Image.frombytes("RGB", (width, height), random.Random(drawn).randbytes(width * height * 3)),
        )

    return [given.row._replace(helpers=tuple(noise(*one) for one in enumerate(given.record.image_output)))]


def _no_image(given: Given) -> list[Row]:
    """Grey pictures of the input images' sizes."""
    grey = []
    for path in given.record.image_input:
        height, width = given.source.finder.size(given.record, "image_input", path)
        grey.append(Picture.drawn(f"grey/{width}x{height}", partial(Image.new, "RGB", (width, height), GREY)))
    return [given.row._replace(inputs=tuple(grey))]


def _helper_only(given: Given) -> list[Row]:
    """Nothing but the latents to read the answer from."""
    extra = {key: value for key, value in given.row.extra.items() if key != TURNS_BEFORE}
    return [given.row._replace(text_input=given.spec.question, inputs=(), extra=extra)]


MAKERS: dict[Kind, Callable[[Given], list[Row]]] = {
    "helper-input": _helper_input,
    # The row without its helper, and the row that sees it.
    "helper-rows": lambda given: [_without_helper(given.row), *_helper_input(given)],
    "helper-text": _helper_text,
    # Another record's helpers.
    "helper-swap": lambda given: [given.row._replace(helpers=given.source.row(given.partner).helpers)],
    "helper-noise": _helper_noise,
    "no-image": _no_image,
    "helper-only": _helper_only,
}
