r"""BLINK-Jigsaw: which of two patches fills the corner that a picture lacks, as ``\boxed{A}`` or ``\boxed{B}``.

Built from any folder of photographs; BLINK's own rows are converted to be evaluated on. The helper image is the
picture with the right patch in its gap.
"""

import hashlib
import io
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image, ImageChops, ImageOps, ImageStat
from pydantic import Field

from mirage_ds.errors import UserError
from mirage_ds.tasks import tables
from mirage_ds.tasks.choices import ChoiceTask, read_choice, without_letters
from mirage_ds.tasks.draft import BuildReport, Draft, Picture
from mirage_ds.tasks.task import Settings

Split = Literal["train", "dev", "test"]
Corner = Literal["upper-left", "upper-right", "lower-left", "lower-right"]

CORNERS: tuple[Corner, ...] = ("upper-left", "upper-right", "lower-left", "lower-right")
OPTIONS = ["the second image", "the third image"]
QUESTION = "The {corner} corner of the first image is cut out. Which image shows the part that belongs there?"
# Two patches whose pixels differ by less than this on average (of 255) are one sky and another.
MIN_DIFFERENCE = 4.0
# Draws of a wrong patch before a photograph is given up as the same all over.
_TRIES = 20


class JigsawSettings(Settings):
    """How puzzles are cut."""

    photos: Path = Field(description="folder of photographs, looked through with its subfolders")
    count: int | None = Field(None, ge=1, description="rows to make, one a photograph [default: all of the split]")
    split: Split = Field("train", description="which photographs; follows from a file's content, whatever the seed")
    corner: Literal["any"] | Corner = Field("lower-right", description="which is cut out; BLINK's is lower-right")
    cut: float = Field(0.5, ge=0.1, le=0.5, description="share of width and of height that is cut out")
    side: int = Field(512, ge=56, description="px of the longer side; a larger photograph is shrunk, none is enlarged")
    min_side: int = Field(224, ge=56, description="px the shorter side must have then; smaller ones are left out")
    seed: int = Field(0, description="the same seed and photographs give the same bytes")


class BlinkSettings(tables.ConvertSettings):
    """Which of BLINK's rows."""

    split: str | None = Field(None, description="val or test; needed for a folder that holds both")


def split_of(content: bytes) -> Split:
    """Return "train" (80 %), "dev" (10 %) or "test" (10 %) by the hash of a file's content."""
    share = int(hashlib.sha256(content).hexdigest()[:8], 16) % 10
    return "test" if share == 9 else "dev" if share == 8 else "train"


def cut_puzzle(photo: Image.Image, corner: Corner, cut: float, rng: random.Random) -> tuple[Image.Image, ...]:
    """Cut a corner out of a photograph, and a patch of the same size from a place that does not meet it.

    Args:
        photo: RGB.
        cut: share of each side, at most a half.

    Returns:
        The photograph with the gap, the patch that was there, and the one from elsewhere.

    Raises:
        BadRow: the patches elsewhere look like the one cut out.
    """
    width, height = photo.size
    patch = (int(width * cut), int(height * cut))
    span = (width - patch[0], height - patch[1])
    at = (span[0] * corner.endswith("right"), span[1] * corner.startswith("lower"))
    right = _crop(photo, at, patch)
    for _ in range(_TRIES):
        place = (rng.randint(0, span[0]), rng.randint(0, span[1]))
        # One side is drawn anew so that the two do not meet: of all places most would.
        axis = rng.randrange(2)
        away = rng.randint(0, span[axis] - patch[axis]) if at[axis] else rng.randint(patch[axis], span[axis])
        wrong = _crop(photo, (away, place[1]) if axis == 0 else (place[0], away), patch)
        if sum(ImageStat.Stat(ImageChops.difference(right, wrong)).mean) >= MIN_DIFFERENCE * 3:
            gap = photo.copy()
            gap.paste((0, 0, 0), (*at, at[0] + patch[0], at[1] + patch[1]))
            return gap, right, wrong
    raise tables.BadRow("alike all over")


def _crop(photo: Image.Image, at: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    return photo.crop((at[0], at[1], at[0] + size[0], at[1] + size[1]))


class Jigsaw(ChoiceTask):
    """BLINK-Jigsaw; see the module."""

    build_settings = JigsawSettings
    convert_settings = BlinkSettings

    def build(self, settings: JigsawSettings, report: BuildReport) -> Iterator[Draft]:
        """Cut puzzles out of a folder of photographs: one corner missing, two patches to choose from."""
        files = tables.images_among(settings.photos.rglob("*"), f"--photos {settings.photos}")
        rng = random.Random(f"{settings.seed}/jigsaw")
        rng.shuffle(files)
        made, seen = 0, set[bytes]()
        letters: list[str] = []
        for file in files:
            if made == settings.count:
                return
            with tables.reading(file):
                content = file.read_bytes()
            digest = hashlib.sha256(content).digest()
            if split_of(content) != settings.split:
                report.excluded += 1
            elif digest in seen:
                report.duplicates += 1
            else:
                seen.add(digest)
                # Two letters in two rows, in an order of chance: as many of the one as of the other.
                letters = letters or rng.sample("AB", 2)
                try:
                    draft = self._draft(content, digest.hex()[:16], letters[-1], settings)
                except tables.BadRow as error:
                    report.note(f"photographs left out, {error}")
                    continue
                made += 1
                letters.pop()
                yield draft
        if made < (settings.count or 0):
            what = f"only {made} of its {len(files)} photographs can be used in split {settings.split}"
            how = "ask for fewer, give more, or lower --min_side"
            raise UserError(f"--photos {settings.photos}: {what}, not the {settings.count} asked for; {how}")

    def _draft(self, content: bytes, photo: str, letter: str, settings: JigsawSettings) -> Draft:
        """Make a photograph's puzzle; BadRow where it gives none."""
        # By the photograph, not by its turn: another folder beside it changes nothing in its puzzle.
        rng = random.Random(f"{settings.seed}/jigsaw/{photo}")
        corner = rng.choice(CORNERS) if settings.corner == "any" else settings.corner
        try:
            image = _load(content, settings.side)
        except Exception:  # noqa: BLE001  # broken files lead Pillow's decoders to errors of almost any class
            raise tables.BadRow("unreadable") from None
        if min(image.size) < settings.min_side:
            raise tables.BadRow("too small")
        gap, right, wrong = cut_puzzle(image, corner, settings.cut, rng)
        patches = (right, wrong) if letter == "A" else (wrong, right)
        question = QUESTION.format(corner=corner.replace("-", " "))
        puzzle = {"question": question, "options": OPTIONS, "corner": corner, "photo": photo}
        extra = {**puzzle, "split": settings.split, "seed": settings.seed}
        images, helpers = tuple(map(Picture.of, (gap, *patches))), (Picture.of(image),)
        return Draft(f"\\boxed{{{letter}}}", images, helpers, extra, kind=letter)

    def convert(self, source: Path, settings: BlinkSettings, report: BuildReport) -> Iterator[Draft]:
        """Convert BLINK's Jigsaw rows (Parquet as the Hub has them, or `save_to_disk`) to evaluate on."""
        files = tables.find_tables(source, "Jigsaw", settings.split)
        tables.need_columns(files, ("idx", "question", "choices", "answer", "image_1"))
        return tables.drafts(files, partial(_blink, report), settings, report)


def _blink(report: BuildReport, row: tables.Row) -> Draft:
    values = row.values
    question, options = row.text("question"), without_letters(row.texts("choices"))
    further = [name for name in ("image_2", "image_3", "image_4") if values.get(name) is not None]
    images = tuple(row.picture(values[name], name) for name in ("image_1", *further))
    answer = str(values.get("answer") or "")
    letter = read_choice(f"\\boxed{{{answer}}}", options)
    if letter is None and answer.strip("() ").lower() not in ("", "hidden"):
        raise tables.BadRow(f"answer {answer!r} is none of its {len(options)} choices")
    if letter is None:
        report.note("answers withheld")
    extra = {"question": question, "options": options, "idx": str(values["idx"])}
    return Draft(f"\\boxed{{{letter}}}" if letter else "", images, extra=extra, kind=letter or "")


def _load(content: bytes, side: int) -> Image.Image:
    """Decode a photograph upright as RGB and shrink it to at most `side` px."""
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((side, side), Image.Resampling.LANCZOS)
    return upright
