r"""SAT: spatial questions about one or two images, answered by an option's text, as ``\boxed{rotated left}``.

The data has no helper images: they come from a folder of the user's, one a row.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

from pydantic import Field

from mirage_ds.errors import UserError
from mirage_ds.tasks import tables
from mirage_ds.tasks.choices import ChoiceTask, plain
from mirage_ds.tasks.draft import BuildReport, Draft

# The paper's two kinds of question, as it writes them and as the data does.
PAPERS_TYPES = ["goal-aim", "object-movement", "obj-movement"]
LACKING = "rows without a helper image (sft and evaluation only)"
# SAT and SAT-v2 name the column of images differently.
_IMAGE_COLUMNS = ("image_bytes", "images")
_ID_COLUMNS = ("id", "idx")


class SatSettings(tables.ConvertSettings):
    """Which rows, and where their helper images lie."""

    question_types: list[str] = Field(PAPERS_TYPES, description="values of question_type, - and _ alike, or all")
    helpers: Path | None = Field(
        None,
        description="folder of helper images, each called as its row's id, or its number from 0 where rows have none",
    )
    split: str | None = Field(None, description="train, static, val or test; needed for a folder that holds several")


class Sat(ChoiceTask):
    """SAT; see the module."""

    convert_settings = SatSettings
    letter_first = False
    boxed = "the text of the right option"

    def convert(self, source: Path, settings: SatSettings, report: BuildReport) -> Iterator[Draft]:
        """Convert rows of SAT or SAT-v2 (Parquet, or `save_to_disk`); helper images come from --helpers."""
        files = tables.find_tables(source, split=settings.split)
        tables.need_columns(files, ("question", "answers", "question_type", "correct_answer"))
        there = tables.columns_of(files[0])
        images = next((name for name in _IMAGE_COLUMNS if name in there), None)
        if images is None:
            raise UserError(f"{files[0]}: has no column {' or '.join(_IMAGE_COLUMNS)}; name the data set that has it")
        name = next((name for name in _ID_COLUMNS if name in there), None)
        # The images are not read for that.
        kinds = tables.read_rows(files, ["question_type"])
        fitting = tables.of_types(kinds, "question_type", "--question_types", settings.question_types, report)
        helpers = folder_of_images(settings.helpers) if settings.helpers else {}

        def make(row: tables.Row) -> Draft:
            own = str(row.number if name is None else row.values[name])
            return _draft(row, images, own, helpers.get(stem_of(own)), settings.seed, report)

        helped = False
        for draft in tables.drafts(files, make, settings, report, fitting):
            helped = helped or bool(draft.helpers)
            yield draft
        if helpers and not helped:
            example = next(iter(helpers.values())).name
            called = "0, 1, 2, … by their place" if name is None else f"as their column '{name}' says"
            what = f"no row has one of its {len(helpers)} images ({example}, …)"
            how = f"the rows are called {called}, so rename the images"
            raise UserError(f"--helpers {settings.helpers}: {what}; {how}")


def _draft(row: tables.Row, column: str, own: str, helper: Path | None, seed: int, report: BuildReport) -> Draft:
    values = row.values
    question, right = row.text("question"), row.text("correct_answer")
    options = list(row.texts("answers"))
    # In an order of chance: nothing says that the data's own order gives nothing away.
    random.Random(f"{seed}/sat/{own}").shuffle(options)
    at = list(map(plain, options))
    if at.count(plain(right)) != 1:
        raise tables.BadRow(f"correct_answer {right!r} stands {at.count(plain(right))} times among its answers")
    stored = values.get(column)
    if not isinstance(stored, list) or not stored:
        raise tables.BadRow(f"{column} holds no image")
    images = tuple(row.picture(value, f"image {n}") for n, value in enumerate(stored, 1))
    if "{" in right or "}" in right:
        raise tables.BadRow(f"correct_answer {right!r} has a brace, which cannot stand in a box")
    if not helper:
        report.note(LACKING)
    kind = values["question_type"]
    asked = {"question": question, "options": options, "question_type": kind}
    extra = {**asked, "level": tables.type_name(str(kind)), "row": own, "seed": seed}
    helpers, letter = (row.picture(helper, "its helper"),) if helper else (), ascii_uppercase[at.index(plain(right))]
    return Draft(f"\\boxed{{{right.strip()}}}", images, helpers, extra, kind=letter)


def folder_of_images(folder: Path) -> dict[str, Path]:
    """Return the images of --helpers by the names of their files without suffix; of numbers, without leading zeros.

    Raises:
        UserError: no such folder, no image, or two with one name.
    """
    found: dict[str, Path] = {}
    for path in tables.images_among(folder.glob("*"), f"--helpers {folder}"):
        other = found.setdefault(stem_of(path.stem), path)
        if other != path:
            raise UserError(f"--helpers {folder}: {other.name} and {path.name} are for one row; keep one of them")
    return found


def stem_of(name: str) -> str:
    """Return a row's name as the names of files spell it: 7, 07 and 007 are one."""
    return str(int(name)) if name.isdecimal() else name
