"""Rationales from an OpenAI-compatible server: chat completions with the pictures as `data:` URLs."""

import base64
import io
import random
from collections.abc import Collection, Iterator
from typing import Any

from PIL import ExifTags, Image

from mirage_ds.chat import Chat, Reply
from mirage_ds.curate.rationalize.journal import Job
from mirage_ds.curate.rationalize.prompt import Questions, Shown
from mirage_ds.data.images import ImageFinder, png_of
from mirage_ds.data.record import Record


def data_url(finder: ImageFinder, record: Record, shown: Shown, max_pixels: int | None) -> str:
    """Return a picture as base64 in a URL: the file's bytes, or a PNG of the pixels that the trainer sees.

    Args:
        max_pixels: a larger picture is made smaller, its sides in proportion.

    Raises:
        RecordError: the image is missing or does not decode.
    """
    picture = finder.load(record, *shown)
    content = finder.find(record, *shown).read_bytes()
    scale = (max_pixels / (picture.width * picture.height)) ** 0.5 if max_pixels else 1
    kind = _plain(content) if scale >= 1 else ""
    if scale < 1:
        sides = [max(1, int(side * scale)) for side in picture.size]
        picture = picture.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
    if not kind:
        # Pillow would write notes of the transparency and of the turn again, which are in the pixels now.
        picture.info.clear()
        content, kind = png_of(picture), "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _plain(content: bytes) -> str:
    """Return the media type of a file that means to everybody what it means to the trainer; "" of another one.

    That is a PNG or JPEG of one picture, 8 bits, without transparency or a turn that viewers make.
    """
    with Image.open(io.BytesIO(content)) as image:
        one = image.format in ("PNG", "JPEG") and image.mode in ("L", "RGB") and getattr(image, "n_frames", 1) == 1
        as_is = "transparency" not in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return Image.MIME[str(image.format)] if one and as_is else ""


class Server:
    """Asks a server."""

    def __init__(self, questions: Questions):
        self.questions, self.spec = questions, questions.spec
        spec = self.spec
        self.chat = Chat(
            str(spec.endpoint), str(spec.model_name), spec.key_variable, spec.parallel, spec.timeout, spec.tries
        )

    def replies(self, jobs: Collection[Job]) -> Iterator[tuple[Job, Reply]]:
        """Ask for what is wanted, `parallel` jobs at a time; yield what comes as it comes.

        Raises:
            UserError: the server refuses what all jobs have in common, or is gone.
        """
        return self.chat.replies(jobs, self.ask)

    def ask(self, job: Job) -> Reply:
        """Ask for one reply, again and again where that may help."""
        record = self.questions.judges[job[0]].record
        with self.questions.source.told(record):
            request = self._request(job)
        blame = (
            f"the request was that of line {record.line}: check --model_name, --max_new_tokens, --max_pixels, "
            "--limit_key and --temperature"
        )
        return self.chat.ask(request, blame)

    def _request(self, job: Job) -> dict[str, Any]:
        row, sample = job
        record = self.questions.judges[row].record
        content: list[dict[str, Any]] = []
        for part in self.questions.request(row):
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                url = data_url(self.questions.source.finder, record, part, self.spec.max_pixels)
                content.append({"type": "image_url", "image_url": {"url": url}})
        request = {
            "messages": [{"role": "user", "content": content}],
            "temperature": self.spec.temperature,
            self.spec.limit_key: self.spec.max_new_tokens,
        }
        if self.spec.seed is not None:
            # Of its own for each job: with one seed for all, the samples of a row would be the same text.
            request["seed"] = random.Random(f"{self.spec.seed}/{row}/{sample}").getrandbits(31)
        return request
