"""Rationales from an OpenAI-compatible server: chat completions with the pictures as `data:` URLs.

httpx2 speaks HTTP. When to ask again is decided here: huggingface_hub's http_backoff sleeps where nothing can stop it,
waits as long as a server says, closes the client that all threads share, and takes any 200 for a reply.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import islice
from queue import SimpleQueue
from typing import Any

import httpx2

from mirage_ds.curate.rationalize.job import Job, Lost, Pending, Reply, Rows
from mirage_ds.curate.rationalize.pictures import data_url
from mirage_ds.curate.rationalize.prompt import Template
from mirage_ds.curate.rationalize.spec import USUAL_KEY_VARIABLE, RationalizeSpec
from mirage_ds.curate.rewrite import told
from mirage_ds.errors import UserError, reason

# The first wait before asking again; each further one is twice as long.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
# A server that asks for more is asked again after this.
LONGEST_TOLD_S = 3600.0
# Of these another try may get a reply: request timeout, conflict, too early, too many requests. And of all 5xx.
PASSING = (408, 409, 425, 429)
# So many jobs without a reply one after another, or --parallel if that is more, and the server is gone.
GONE_AFTER = 8


class _NoReply(Exception):
    """A try without a reply.

    Attributes:
        after: the seconds that the server asks to wait, if it does.
    """

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


def read_key(variable: str | None) -> str | None:
    """Read the key from the environment; None where no variable is named and the usual one is not set.

    Raises:
        UserError: the variable named is not set, or its content can be no key. The content is not told.
    """
    name = variable or USUAL_KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if not key:
        if variable:
            raise UserError(f"--key_variable {variable}: this environment variable is not set; set it to the key")
        return None
    if not key.isascii() or not key.isprintable():
        raise UserError(f"environment variable {name}: holds characters that no key has; set it to the key alone")
    return key


def chat_url(endpoint: str) -> str:
    """Return where chat completions are asked for.

    Raises:
        UserError: no URL of an HTTP server, or one that holds a secret.
    """
    try:
        url = httpx2.URL(endpoint.strip())
    except httpx2.InvalidURL as error:
        raise UserError(f"--endpoint {endpoint}: no URL ({reason(error)}); write it like http://host:8000/v1") from None
    if url.userinfo or url.query:
        raise UserError("--endpoint: holds a name, password or query; give the key by --key_variable")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--endpoint {endpoint}: no address of an HTTP server; write it like http://host:8000/v1")
    bare = str(url).rstrip("/").removesuffix("/chat/completions")
    return f"{bare}/chat/completions"


@dataclass
class Server:
    """Asks a server.

    Attributes:
        stop: set when the command ends; waits end then.
    """

    spec: RationalizeSpec
    template: Template
    rows: Rows
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.url = chat_url(self.spec.endpoint or "")
        self.key = read_key(self.spec.key_variable)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        limits = httpx2.Limits(max_connections=self.spec.parallel, max_keepalive_connections=self.spec.parallel)
        self.client = httpx2.Client(timeout=self.spec.timeout, limits=limits, headers=headers)

    def replies(self, samples: int, pending: Pending) -> Iterator[tuple[Job, Reply | Lost]]:
        """Ask for what is pending, `parallel` jobs at a time; yield what comes as it comes.

        Raises:
            UserError: the server refuses what all jobs have in common, or is gone.
        """
        lost = 0
        for job, found in self._as_ready(self._jobs(samples, pending)):
            yield job, found
            lost = lost + 1 if isinstance(found, Lost) and found.server else 0
            if lost >= max(GONE_AFTER, self.spec.parallel):
                assert isinstance(found, Lost)
                raise UserError(
                    f"--endpoint {self.spec.endpoint}: no reply to {lost} jobs in a row, each tried "
                    f"{self.spec.tries} times ({found.why}); start the same command again when the server answers"
                )
        self.client.close()

    def _as_ready(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Reply | Lost]]:
        """Ask for `parallel` jobs at a time; yield them in the order in which they end.

        concurrent.futures joins its threads when the interpreter ends, so whoever stops the command would wait for the
        slowest request; these threads are daemons.
        """
        done: SimpleQueue[tuple[Job, Reply | Lost | Exception]] = SimpleQueue()

        def work(job: Job) -> None:
            try:
                done.put((job, self.ask(job)))
            except Exception as error:  # noqa: BLE001  # raised again where the results are read
                done.put((job, error))

        running = 0
        try:
            while True:
                for job in islice(jobs, self.spec.parallel - running):
                    threading.Thread(target=work, args=(job,), daemon=True).start()
                    running += 1
                if not running:
                    return
                job, found = done.get()
                running -= 1
                if isinstance(found, Exception):
                    raise found
                yield job, found
        finally:
            self.stop.set()

    def _jobs(self, samples: int, pending: Pending) -> Iterator[Job]:
        for row, judge in self.rows:
            for sample in range(samples):
                if pending(row, sample):
                    yield Job(row, sample, judge)

    def ask(self, job: Job) -> Reply | Lost:
        """Ask for one reply, again and again where that may help."""
        with told(self.rows.file, job.judge.record.line):
            body = json.dumps(self._request(job)).encode()
        wait = FIRST_WAIT_S
        why = ""
        for last in [False] * (self.spec.tries - 1) + [True]:
            try:
                return self._try(job, body)
            except _NoReply as error:
                why = str(error)
                # Spread, so that those who failed together do not come back together.
                pause = wait * random.uniform(0.5, 1) if error.after is None else min(error.after, LONGEST_TOLD_S)
            if last or self.stop.wait(pause):
                break
            wait = min(2 * wait, LONGEST_WAIT_S)
        return Lost(why, server=True)

    def _request(self, job: Job) -> dict[str, Any]:
        record = job.judge.record
        content: list[dict[str, Any]] = []
        for part in self.template.fill(record, job.judge.boxed):
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                url = data_url(self.rows.finder, record, part, self.spec.max_pixels)
                content.append({"type": "image_url", "image_url": {"url": url}})
        request = {
            "model": self.spec.model_name,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.spec.temperature,
            self.spec.limit_key: self.spec.max_new_tokens,
        }
        if self.spec.seed is not None:
            # Of its own for each job: with one seed for all, the samples of a row would be the same text.
            request["seed"] = random.Random(f"{self.spec.seed}/{job.row}/{job.sample}").getrandbits(31)
        return request

    def _try(self, job: Job, body: bytes) -> Reply | Lost:
        try:
            response = self.client.post(self.url, content=body)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _NoReply(self._hidden(f"{type(error).__name__}: {error}")) from None
        if response.status_code in PASSING or response.status_code >= 500:
            raise _NoReply(f"{response.status_code} {self._said(response)}", retry_after(response.headers))
        if response.status_code != 200:
            raise self._refused(job, response)
        return self._read(response)

    def _read(self, response: httpx2.Response) -> Reply | Lost:
        """Read the reply out of a chat completion."""
        try:
            values = response.json()
            choice = values["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text = message.get("content")
            refusal = message.get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _NoReply(f"200, but no chat completion: {self._said(response)}") from None
        if finish == "content_filter" or refusal:
            return Lost(self._hidden(f"refused: {refusal or finish}"), server=False)
        if not isinstance(text, str):
            raise _NoReply(f"200, but no text: {self._said(response)}")
        usage = values.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        asked, written = (count if type(count) is int else 0 for count in counts)
        served = values.get("model")
        return Reply(text, finish == "length", served if isinstance(served, str) else "", (asked, written))

    def _refused(self, job: Job, response: httpx2.Response) -> UserError:
        """Make the error of an answer that no further try can change."""
        status = response.status_code
        if status in (401, 403):
            name = self.spec.key_variable or USUAL_KEY_VARIABLE
            how = f"check the key in {name}" if self.key else "name the variable that holds the key with --key_variable"
        elif status == 404:
            how = f"check the URL (it ends in /v1 with most servers) and --model_name {self.spec.model_name}"
        elif 300 <= status < 400:
            how = f"give the address itself ({response.headers.get('location', 'it names none')})"
        else:
            how = (
                f"the request was that of line {job.judge.record.line}: check --model_name, --max_new_tokens, "
                "--max_pixels, --limit_key and --temperature"
            )
        return UserError(f"--endpoint {self.spec.endpoint}: the server answers {status} {self._said(response)}; {how}")

    def _said(self, response: httpx2.Response) -> str:
        """Return what a server says of its failure, in brackets, on one line."""
        try:
            values = response.json()
            said = values["error"]["message"] if isinstance(values["error"], dict) else values["error"]
        except (ValueError, KeyError, TypeError):
            said = response.text
        text = " ".join(str(said).split())
        return f"({self._hidden(text)[:200]})" if text else f"({response.reason_phrase})"

    def _hidden(self, text: str) -> str:
        """Servers may repeat the key that they refuse."""
        return text.replace(self.key, "[key]") if self.key else text


def retry_after(headers: httpx2.Headers) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3: seconds or a date); None if it does not."""
    told = headers.get("retry-after", "").strip()
    if told.isascii() and told.isdecimal():
        return float(told)
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None
