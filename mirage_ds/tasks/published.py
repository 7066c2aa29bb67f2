r"""Data that latent papers train on, as their authors hand it out: Monet-SFT-125K, LVR's Visual-CoT rows, Zebra-CoT.

docs/tasks.md says which of the authors' files each layout was read from. A picture in an answer becomes a helper image,
and stands where it stood. An answer is scored as the record's own is written: by its last ``\boxed{…}`` or
``<answer>…</answer>``, or else as a whole.
"""

import io
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from mirage_ds.data.messages import HELPER_MARK, IMAGE_MARK
from mirage_ds.errors import shown
from mirage_ds.tasks import tables
from mirage_ds.tasks.boxed import BoxedAnswer, last_boxed
from mirage_ds.tasks.choices import marked_question
from mirage_ds.tasks.draft import BuildReport, Draft, Picture

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)
# Monet's marks: of a picture's latents, and of text that it makes the latents see.
_LATENTS = "<abs_vis_token></abs_vis_token>"
_OBSERVATION = re.compile(r"</?observation>")
# Zebra-CoT's: the column that holds the picture.
_SHOWN = re.compile(r"<image_start>\[(\w+)\]<image_end>")
# LVR takes whole tokens of 28 × 28 px.
_TOKEN = 28


class PublishedSettings(tables.ConvertSettings):
    """Which rows, and where their pictures lie."""

    image_root: Path | None = Field(
        None, description="folder that image paths start from [default: the file's, or one of the two above it]"
    )


class _Published(BoxedAnswer):
    """What the three have in common; `_draft` is each one's own."""

    convert_settings = PublishedSettings

    def prompt(self, row: Mapping[str, Any], settings: Any) -> str:
        """Return the authors' question."""
        return marked_question(row)

    def parse(self, text: str, row: Mapping[str, Any]) -> str | None:
        """Return the answer in the place where the record's own has it, letter case and spaces folded."""
        own = str(row.get("text_output") or text)
        # The last takes any text whole.
        readers: tuple[Callable[[str], str | None], ...] = (last_boxed, _last_tagged, str)
        read = next(read for read in readers if read(own) is not None)
        return " ".join((read(text) or "").casefold().split()) or None

    def convert(self, source: Path, settings: PublishedSettings, report: BuildReport) -> Iterator[Draft]:
        """Convert a file that Monet's, LVR's or Zebra-CoT's authors hand out, or a folder of such files."""
        return tables.drafts(_files(source), partial(self._draft, root=settings.image_root), settings, report)

    @abstractmethod
    def _draft(self, row: tables.Row, root: Path | None) -> Draft:
        """Make a row's draft; image paths start from `root` if there is one."""


def _last_tagged(text: str) -> str | None:
    return next(reversed(_ANSWER.findall(text)), None)


def _files(source: Path) -> list[Path]:
    """Return a file itself, or a folder's arrays or tables, wherever below it they lie."""
    return [source] if source.is_file() else sorted(source.rglob("train.json")) or tables.find_tables(source)


def _picture(row: tables.Row, value: Any, root: Path | None) -> Picture:
    """Take a picture; a path starts from the root, or from the row's folder or one of the two above it."""
    if not isinstance(value, str):
        return row.picture(value, "its picture")
    tops = [root] if root else list(islice((row.folder.absolute(), *row.folder.absolute().parents), 3))
    found = next((top / value for top in tops if (top / value).is_file()), None)
    if found is None:
        raise tables.BadRow(f"image {value} is not below {tops[0]}; unpack the images, or name --image_root")
    return row.picture(found, "image")


class Monet(_Published):
    """Monet-SFT-125K: conversations whose answers show pictures, each behind a mark for its latents."""

    def _draft(self, row: tables.Row, root: Path | None) -> Draft:
        texts = {"user": "", "assistant": ""}
        pictures: dict[str, list[Picture]] = {"user": [], "assistant": []}
        for turn in row.objects("data"):
            # Its system prompt says how Monet's latents are written; the authors' loader replaces it too.
            role = str(turn.get("role"))
            for item in row._replace(values=turn).objects("content") if role in texts else ():
                if item.get("type") == "image":
                    pictures[role].append(_picture(row, item.get("image"), root))
                    texts[role] += IMAGE_MARK if role == "user" else ""
                elif isinstance(item.get("text"), str):
                    texts[role] += item["text"]
                else:
                    raise tables.BadRow(f"{shown(item)} is no text and no image")
        answer = _OBSERVATION.sub("", texts["assistant"].replace(_LATENTS, HELPER_MARK))
        about = row.values.get("metadata") or {}
        level, number = about.get("dataset_name"), about.get("sample_id")
        return _made(texts["user"], answer, pictures["user"], pictures["assistant"], level, id=number)


class Lvr(_Published):
    """LVR's rows of Visual-CoT: boxes in the picture, whose parts the latents stand for; a helper is that part."""

    def _draft(self, row: tables.Row, root: Path | None) -> Draft:
        turns = row.objects("conversations")
        if [turn.get("from") for turn in turns] != ["human", "gpt"]:
            raise tables.BadRow("its conversations are not one question of human and one answer of gpt")
        question, answer = (row._replace(values=turn).text("value") for turn in turns)
        names = row.values.get("image")
        names = names if isinstance(names, list) else [names]
        if len(names) != 1:
            raise tables.BadRow(f"image is {shown(names)}, not one path")
        image = _picture(row, names[0], root)
        boxes = row.values.get("bboxes")
        helpers = [_part(image, box) for box in (boxes if isinstance(boxes, list) else [])]
        answer, level = answer.replace("<lvr>", HELPER_MARK), row.values.get("dataset")
        return _made(question, answer, [image], helpers, level, id=row.values.get("question_id"), bboxes=boxes)


class Zebra(_Published):
    """Zebra-CoT: a trace of thoughts with pictures, and a final answer, which is put into a box."""

    def _draft(self, row: tables.Row, root: Path | None) -> Draft:
        inputs = [name for name, value in row.values.items() if name.startswith("problem_image_") and value]
        helpers: list[str] = []

        def shown_in_trace(match: re.Match[str]) -> str:
            if match[1] in inputs:
                return f"problem image {inputs.index(match[1]) + 1}"
            helpers.append(match[1])
            return HELPER_MARK

        question, trace = row.text("Question"), _SHOWN.sub(shown_in_trace, row.text("Text Reasoning Trace"))
        marked = _SHOWN.findall(question)
        final = row.text("Final Answer").strip()
        final = final if last_boxed(final) is not None else f"\\boxed{{{final}}}"
        unmarked = [name for name in inputs if name not in marked]
        question = IMAGE_MARK * len(unmarked) + _SHOWN.sub(IMAGE_MARK, question)
        level = row.folder.name if row.folder.name != "data" else row.folder.parent.name
        images = [_picture(row, row.values.get(name), root) for name in unmarked + marked]
        thought = [_picture(row, row.values.get(name), root) for name in helpers]
        return _made(question, f"{trace.rstrip()}\nThe answer is {final}.", images, thought, level)


def _part(image: Picture, box: Any) -> Picture:
    """Cut out x0, y0, x1, y1 (shares of the sides), grown to a token's size where it is smaller."""
    four = isinstance(box, list) and len(box) == 4 and all(isinstance(one, (int, float)) for one in box)
    if not four or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise tables.BadRow(f"a box of bboxes is {shown(box)}, not x0, y0, x1, y1 from 0 to 1")
    with Image.open(io.BytesIO(image.content())) as whole:
        edges = []
        for low, high, side in ((box[0], box[2], whole.width), (box[1], box[3], whole.height)):
            first, length = math.floor(low * side), math.ceil(high * side) - math.floor(low * side)
            wanted = max(length, min(_TOKEN, side))
            first = min(max(0, first - (wanted - length) // 2), side - wanted)
            edges.append((first, first + wanted))
        (left, right), (top, bottom) = edges
        return Picture.of(whole.convert("RGB").crop((left, top, right, bottom)))


def _made(question: str, answer: str, images: list[Picture], helpers: list[Picture], level: Any, **extra: Any) -> Draft:
    """Make the draft of a question and an answer; BadRow where a picture of the answer has no mark."""
    if answer.count(HELPER_MARK) != len(helpers):
        raise tables.BadRow(f"its answer has {answer.count(HELPER_MARK)} {HELPER_MARK} marks for {len(helpers)} images")
    known = {"question": question, **extra, "level": level and str(level)}
    kept = {key: value for key, value in known.items() if value is not None}
    return Draft(answer, tuple(images), tuple(helpers), kept)
