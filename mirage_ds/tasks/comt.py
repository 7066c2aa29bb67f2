r"""COMT: chains of thought with images in them, answered by a letter, as ``\boxed{C}``: several latent blocks a record.

Two forms are read: the data set's own (data.jsonl beside images/, the images marked inside the rationale), and one
packed for latent blocks (`sequence_plan`, a list of texts and helper images).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mirage_ds.data.messages import HELPER_MARK, IMAGE_MARK
from mirage_ds.errors import shown
from mirage_ds.tasks import tables
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.choices import ChoiceTask, marked_question, read_choice, without_letters
from mirage_ds.tasks.draft import BuildReport, Draft, Picture

LETTERS = ["A", "B", "C", "D"]
# In the list of images: [IMAGE0:ID].
_ENTRY = re.compile(r"\[?<?\s*IMAGE[ _]?(\d+)\s*:\s*(.+?)\s*>?\]?")
# In a text: [IMAGE0:ID], <IMAGE0>, IMAGE0 …; the id is read only before a closing bracket, else a sentence goes on.
_MARK = re.compile(
    r"(\[)?(<)?(\()?\bIMAGE[ _]?(?P<number>\d+)(?:\s*:\s*[\w./-]+(?=\s*[\])>]))?(?(3)\s*\))(?(2)\s*>)(?(1)\s*\])"
)


class ComtSettings(tables.ConvertSettings):
    """Which rows."""

    types: list[str] = Field(["creation"], description="values of `type`, or all; creation is the geometry subset")
    split: Literal["all", "train", "test"] = Field(
        "all", description="test: a fifth of the rows, by the hash of their first image; train: the others"
    )


class Comt(ChoiceTask):
    """COMT; see the module."""

    convert_settings = ComtSettings

    def prompt(self, row: Mapping[str, Any], settings: Any) -> str:
        """Return the question with its options; a packed row's question holds them already."""
        if row["options"]:
            return super().prompt(row, settings)
        text = marked_question(row)
        return text if "\\boxed" in text else f"{text}\nPut the letter of the right option in \\boxed{{}}."

    def parse(self, text: str, row: Mapping[str, Any]) -> str | None:
        """Return the letter of the option that is answered; without options A to D are known."""
        return read_choice(text, row["options"] or LETTERS)

    def convert(self, source: Path, settings: ComtSettings, report: BuildReport) -> Iterator[Draft]:
        """Convert COMT's data.jsonl with images/, or rows with a `sequence_plan` (JSON lines, Parquet, Arrow)."""
        files, images = _files(source), cache(_images_by_name)

        def make(row: tables.Row) -> Draft:
            return _packed(row) if "sequence_plan" in row.values else _own(row, images(row.folder / "images"))

        def in_split(row: tables.Row) -> bool:
            fits = settings.split == "all" or _in_test(row, make) in (None, settings.split == "test")
            report.excluded += not fits
            return fits

        # A packed row may have no type: its file is a subset already.
        rows = tables.of_types(tables.read_rows(files), "type", "--types", settings.types, report, untyped=True)
        return tables.drafts(files, make, settings, report, filter(in_split, rows))


def _files(source: Path) -> list[Path]:
    """Return a folder's data.jsonl, a JSON-lines file, or Parquet or Arrow files."""
    file = source / "data.jsonl" if source.is_dir() else source
    if file.suffix == ".jsonl" and file.is_file():
        return [file]
    files = tables.find_tables(source)
    tables.need_columns(files, ["sequence_plan"])
    return files


def _in_test(row: tables.Row, make: Callable[[tables.Row], Draft]) -> bool | None:
    """Tell whether a row is of the test split; None of a bad one, which is said when its turn comes.

    One picture lies in one split, whatever is asked about it.
    """
    try:
        draft = make(row)
    except tables.BadRow:
        return None
    # A question without an image is told by its text.
    known = draft.images[0].name if draft.images else draft.extra["question"]
    return int(hashlib.sha256(known.encode()).hexdigest()[:8], 16) % 5 == 4


def _answer(values: Mapping[str, Any], text: str, options: list[str]) -> tuple[str, str]:
    """Return the answer's letter, and the text that ends with it in a box.

    Raises:
        BadRow: neither the row nor the text says it, or they say two.
    """
    given = values.get("answer")
    known = options or LETTERS
    boxed = read_choice(text, known)
    letter = boxed if given is None else read_choice(f"\\boxed{{{given}}}", known)
    if letter is None:
        what = f"answer {shown(given)} is none of its {len(known)} options"
        raise tables.BadRow(f"{what}, and its text has no \\boxed{{}}")
    if last_boxed(text) is None:
        return letter, f"{text.rstrip()}\nThe answer is \\boxed{{{letter}}}."
    if boxed != letter:
        raise tables.BadRow(f"its text ends with \\boxed{{{last_boxed(text)}}}, its answer is {letter}")
    return letter, text


def _images_by_name(folder: Path) -> dict[str, list[Path]]:
    """Return the images below a folder by their file names, with and without suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in tables.IMAGES:
            for name in {path.name, path.stem}:
                found.setdefault(name, []).append(path)
    return found


def _image(row: tables.Row, name: str, kind: str, places: Mapping[str, list[Path]]) -> Picture:
    """Find and check an image by its id; of several with one name, the one in its type's own folder.

    Raises:
        BadRow: there is none, or it is broken.
    """
    found = places.get(name) or places.get(Path(name).name) or []
    path = next(iter([path for path in found if path.parent.name == kind] or found), None)
    if path is None:
        raise tables.BadRow(f"image {name!r} is not below images/")
    return row.picture(path, f"image {name}")


def _marked(text: str) -> list[int]:
    return [int(match["number"]) for match in _MARK.finditer(text)]


def _own(row: tables.Row, places: Mapping[str, list[Path]]) -> Draft:
    """Make the draft of a row in the data set's own form.

    Images that the rationale marks are helpers, all others are input images.
    """
    values = row.values
    kind = str(values.get("type") or "")
    question, rationale = row.text("question"), row.text("rationale")
    options = without_letters(row.texts("option"))
    listed = values.get("image") or []
    ids: dict[int, str] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        match = _ENTRY.fullmatch(str(entry).strip())
        if match is None:
            raise tables.BadRow(f"image {shown(entry)} is not of the form [IMAGE0:ID]")
        ids[int(match.group(1))] = match.group(2)
    asked = [number for number in _marked(question) if number in ids]
    # An input image that the rationale names again is no picture thought up, and its mark stays as text.
    thought = [number for number in _marked(rationale) if number not in asked]
    unknown = [number for number in thought if number not in ids]
    if unknown:
        raise tables.BadRow(f"its rationale marks IMAGE{unknown[0]}, which its list of images lacks")
    inputs = asked or [number for number in sorted(ids) if number not in thought]
    unused = set(ids) - set(inputs) - set(thought)
    if unused:
        raise tables.BadRow(f"IMAGE{min(unused)} is marked neither in its question nor in its rationale")

    def latent(match: re.Match[str]) -> str:
        return HELPER_MARK if int(match["number"]) in thought else f"image {int(match['number']) + 1}"

    letter, text = _answer(values, _MARK.sub(latent, rationale), options)
    if asked:
        question = _MARK.sub(lambda match: IMAGE_MARK if int(match["number"]) in ids else match[0], question)
    images, helpers = (tuple(_image(row, ids[n], kind, places) for n in part) for part in (inputs, thought))
    extra = {"question": question, "options": options, "level": kind, "id": values.get("id")}
    return Draft(text, images, helpers, extra, kind=letter)


def _packed(row: tables.Row) -> Draft:
    """Make the draft of a row whose answer is a `sequence_plan`."""
    values = row.values
    question = row.text("text_input")
    stored = values.get("image_input") or []
    stored = stored if isinstance(stored, list) else [stored]
    images = tuple(row.picture(value, "image_input") for value in stored)
    text, helpers = "", []
    for part in row.objects("sequence_plan"):
        if part.get("type") == "text":
            text += row._replace(values=part).text("content")
        elif part.get("type") == "latent":
            text += HELPER_MARK
            helpers.append(row.picture(part.get("helper_image"), "helper_image"))
        else:
            raise tables.BadRow(f"a part of its sequence_plan is of type {shown(part.get('type'))}, not text or latent")
    letter, text = _answer(values, text, [])
    known = {key: values[key] for key in ("id", "type") if values.get(key) is not None}
    level = {"level": str(values["type"])} if values.get("type") else {}
    extra = {"question": question, "options": [], **level, **known}
    return Draft(text, images, tuple(helpers), extra, kind=letter)
