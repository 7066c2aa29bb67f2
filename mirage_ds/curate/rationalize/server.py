"""Rationales from an OpenAI-compatible server: chat completions with the pictures as `data:` URLs.

httpx2 speaks HTTP. When to ask again is decided here: huggingface_hub's http_backoff sleeps where nothing can stop it,
waits as long as a server says, closes the client that all threads share, and takes any 200 for a reply.
"""

import base64
import io
import json
import os
import random
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from typing import Any

import httpx2
from PIL import ExifTags, Image

from mirage_ds.curate.rationalize.form import Reply
from mirage_ds.curate.rationalize.journal import Job
from mirage_ds.curate.rationalize.prompt import Questions, Shown
from mirage_ds.curate.spec import USUAL_KEY_VARIABLE
from mirage_ds.data.images import ImageFinder, png_of
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError

# The first wait before asking again; each further one is twice as long.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
# A server that asks for more is asked again after this.
LONGEST_TOLD_S = 3600.0
# Of these another try may get a reply: request timeout, conflict, too early, too many requests. And of all 5xx.
PASSING = (408, 409, 425, 429)
# So many jobs without a reply one after another, or --parallel if that is more, and the server is gone.
GONE_AFTER = 8


def read_key(variable: str | None) -> str | None:
    """Read the key from the environment; None where no variable is named and the usual one is not set.

    Raises:
        UserError: the variable named is not set, or its content can be no key. The content is not told.
    """
    name = variable or USUAL_KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if not key and variable:
        raise UserError(f"--key_variable {variable}: this environment variable is not set; set it to the key")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"environment variable {name}: holds characters that no key has; set it to the key alone")
    return key or None


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
    """Asks a server.

    Attributes:
        stop: set when the command ends; waits end then.
    """

    def __init__(self, questions: Questions):
        self.questions, self.spec = questions, questions.spec
        self.stop = threading.Event()
        self.url = str(self.spec.endpoint).rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.key = read_key(self.spec.key_variable)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        limits = httpx2.Limits(max_connections=self.spec.parallel, max_keepalive_connections=self.spec.parallel)
        self.client = httpx2.Client(timeout=self.spec.timeout, limits=limits, headers=headers)

    def replies(self, jobs: Collection[Job]) -> Iterator[tuple[Job, Reply]]:
        """Ask for what is wanted, `parallel` jobs at a time; yield what comes as it comes.

        Raises:
            UserError: the server refuses what all jobs have in common, or is gone.
        """
        lost = 0
        # Its threads are daemons: whoever stops the command does not wait for the slowest request, as with
        # concurrent.futures.
        with ThreadPool(min(self.spec.parallel, len(jobs))) as pool:
            try:
                for job, reply in pool.imap_unordered(lambda job: (job, self.ask(job)), jobs):
                    yield job, reply
                    lost = lost + 1 if reply.lost == "no reply" else 0
                    if lost >= max(GONE_AFTER, self.spec.parallel):
                        what = f"no reply to {lost} jobs in a row, each tried {self.spec.tries} times ({reply.text})"
                        how = "start the same command again when the server answers"
                        raise UserError(f"--endpoint {self.spec.endpoint}: {what}; {how}")
            finally:
                self.stop.set()

    def ask(self, job: Job) -> Reply:
        """Ask for one reply, again and again where that may help."""
        with self.questions.source.told(self.questions.judges[job[0]].record):
            body = json.dumps(self._request(job)).encode()
        wait, pause, reply = FIRST_WAIT_S, 0.0, Reply("stopped", lost="no reply")
        for _ in range(self.spec.tries):
            if self.stop.wait(pause):
                break
            reply, after = self._try(job, body)
            if reply.lost != "no reply":
                break
            # Spread, so that those who failed together do not come back together.
            pause = wait * random.uniform(0.5, 1) if after is None else min(after, LONGEST_TOLD_S)
            wait = min(2 * wait, LONGEST_WAIT_S)
        return reply

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
            "model": self.spec.model_name,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.spec.temperature,
            self.spec.limit_key: self.spec.max_new_tokens,
        }
        if self.spec.seed is not None:
            # Of its own for each job: with one seed for all, the samples of a row would be the same text.
            request["seed"] = random.Random(f"{self.spec.seed}/{row}/{sample}").getrandbits(31)
        return request

    def _try(self, job: Job, body: bytes) -> tuple[Reply, float | None]:
        """Ask once; return the reply, or why there is none, and the seconds that the server asks to wait, if it does.

        Raises:
            UserError: no further try, and no other job, would get a reply.
        """
        try:
            response = self.client.post(self.url, content=body)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return Reply(self._hidden(f"{type(error).__name__}: {error}"), lost="no reply"), None
        status, after = response.status_code, response.headers.get("retry-after", "")
        if status in PASSING or status >= 500:
            seconds = float(after) if after.isascii() and after.isdecimal() else None
            return Reply(f"{status} {self._said(response)}", lost="no reply"), seconds
        if status != 200:
            self.stop.set()
            raise self._refused(job, response)
        return self._read(response), None

    def _read(self, response: httpx2.Response) -> Reply:
        """Read the reply out of a chat completion."""
        text = refusal = finish = None
        served, tokens = "", (0, 0)
        # Servers leave out what they like, and then the rest counts.
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            values = response.json()
            choice = values["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            served = str(values.get("model") or "")
            tokens = int(values["usage"]["prompt_tokens"]), int(values["usage"]["completion_tokens"])
        if finish == "content_filter" or refusal:
            return Reply(self._hidden(f"refused: {refusal or finish}"), lost="refused")
        if not isinstance(text, str):
            return Reply(f"200, but no chat completion: {self._said(response)}", lost="no reply")
        return Reply(text, finish == "length", served, tokens)

    def _refused(self, job: Job, response: httpx2.Response) -> UserError:
        """Make the error of an answer that no further try can change."""
        status, key = response.status_code, self.spec.key_variable or USUAL_KEY_VARIABLE
        line = self.questions.judges[job[0]].record.line
        flags = "--model_name, --max_new_tokens, --max_pixels, --limit_key and --temperature"
        how = f"the request was that of line {line}: check {flags}"
        if status in (401, 403):
            how = f"check the key in {key}" if self.key else "name the variable that holds the key with --key_variable"
        elif status == 404:
            how = f"check the URL (it ends in /v1 with most servers) and --model_name {self.spec.model_name}"
        elif 300 <= status < 400:
            how = f"give the address itself ({response.headers.get('location', 'it names none')})"
        return UserError(f"--endpoint {self.spec.endpoint}: the server answers {status} {self._said(response)}; {how}")

    def _said(self, response: httpx2.Response) -> str:
        """Return what a server says of its failure, in brackets, on one line."""
        said = response.text
        with suppress(ValueError, KeyError, TypeError):
            error = response.json()["error"]
            said = error["message"] if isinstance(error, dict) else error
        text = " ".join(str(said).split())
        return f"({self._hidden(text)[:200]})" if text else f"({response.reason_phrase})"

    def _hidden(self, text: str) -> str:
        """Servers may repeat the key that they refuse."""
        return text.replace(self.key, "[key]") if self.key else text
