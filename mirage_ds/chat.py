"""An OpenAI-compatible server: one chat completion for each job, asked for again where that may help.

An error here is that of the process that asks, of which a run has several. httpx2 speaks HTTP. When to ask again is
decided here: huggingface_hub's http_backoff sleeps where nothing can stop it, waits as long as a server says, closes
the client that all threads share, and takes any 200 for a reply.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from mirage_ds.errors import UserError, reason

if TYPE_CHECKING:
    import httpx2

Job = TypeVar("Job", bound=Hashable)
# Sent to a server where it is set and no key_variable is given.
USUAL_KEY_VARIABLE = "OPENAI_API_KEY"
# The first wait before asking again; each further one is twice as long.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
# A server that asks for more is asked again after this.
LONGEST_TOLD_S = 3600.0
# Of these another try may get a reply: request timeout, conflict, too early, too many requests. And of all 5xx.
PASSING = (408, 409, 425, 429)
# So many jobs without a reply one after another, or `parallel` if that is more, and the server is gone.
GONE_AFTER = 8


class Reply(NamedTuple):
    """What a model wrote, or why it wrote nothing.

    Attributes:
        cut: it ended because it had all its tokens.
        served: the model that the server says has written it; "" if it says none.
        tokens: of the request and of the reply, where they are told.
        lost: what became of the job, where `text` is not a reply but the reason why there is none.
    """

    text: str
    cut: bool = False
    served: str = ""
    tokens: tuple[int, int] = (0, 0)
    lost: Literal["refused", "no reply"] | None = None


def read_key(variable: str | None, flag: str = "--key_variable") -> str | None:
    """Read the key from the environment; None where no variable is named and the usual one is not set.

    Raises:
        UserError: the variable named is not set, or its content can be no key. The content is not told.
    """
    name = variable or USUAL_KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if not key and variable:
        what = f"{flag} {variable}: this environment variable is not set; set it to the key"
        raise UserError(what, everywhere=False)
    if not key.isascii() or not key.isprintable():
        what = f"environment variable {name}: holds characters that no key has; set it to the key alone"
        raise UserError(what, everywhere=False)
    return key or None


def read_template(place: Path, flag: str, places: Mapping[str, str], added: str = "") -> str:
    """Read the text of a request, which has each place once.

    Args:
        flag: how the user names the file.
        places: what is put in → what it is, in words.
        added: a place that is put at the end where the text has it not.

    Raises:
        UserError: no such text, or a place is missing or stands there too often.
    """
    try:
        text = place.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {place}: cannot be read ({reason(error)}); name a text file in UTF-8") from None
    text = text if added in text else f"{text}\n\n{added}"
    for name, what in places.items():
        if text.count(name) != 1:
            found = f"stands there {text.count(name)} times" if name in text else "is missing"
            raise UserError(f"{flag} {place}: {name} {found}; write it once, where {what} shall stand")
    return text


class Chat:
    """Asks a server.

    Args:
        flags: how the flags begin by which the user gives what is here: `--endpoint`, `--model_name`, `--key_variable`.
        parallel: requests at a time.
        timeout: seconds for one request.
        tries: requests for one reply, at most.
        longest_told: seconds to wait at most where the server says how long.

    Attributes:
        stop: set when the command ends; waits end then.
    """

    def __init__(
        self,
        endpoint: str,
        model_name: str,
        key_variable: str | None,
        parallel: int,
        timeout: float,
        tries: int,
        flags: str = "--",
        longest_told: float = LONGEST_TOLD_S,
    ):
        import httpx2

        self.endpoint, self.model_name, self.key_variable = endpoint, model_name, key_variable
        self.parallel, self.tries, self.flags, self.longest_told = parallel, tries, flags, longest_told
        self.stop = threading.Event()
        self.url = endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.key = read_key(key_variable, f"{flags}key_variable")
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        limits = httpx2.Limits(max_connections=parallel, max_keepalive_connections=parallel)
        self.client = httpx2.Client(timeout=timeout, limits=limits, headers=headers)

    def replies(self, jobs: Collection[Job], ask: Callable[[Job], Reply]) -> Iterator[tuple[Job, Reply]]:
        """Do jobs, `parallel` at a time; yield what comes as it comes. The server is asked no more after an error.

        Args:
            ask: makes the request of a job and calls `self.ask`.

        Raises:
            UserError: the server refuses what all jobs have in common, or is gone.
        """
        lost = 0
        # Its threads are daemons: whoever stops the command does not wait for the slowest request, as with
        # concurrent.futures.
        with ThreadPool(max(1, min(self.parallel, len(jobs)))) as pool:
            ended = False
            try:
                for job, reply in pool.imap_unordered(lambda job: (job, ask(job)), jobs):
                    yield job, reply
                    lost = lost + 1 if reply.lost == "no reply" else 0
                    if lost >= max(GONE_AFTER, self.parallel):
                        what = f"no reply to {lost} jobs in a row, each tried {self.tries} times ({reply.text})"
                        how = "start the same command again when the server answers"
                        raise UserError(f"{self.flags}endpoint {self.endpoint}: {what}; {how}", everywhere=False)
                ended = True
            finally:
                if not ended:
                    self.stop.set()

    def ask(self, request: dict[str, Any], blame: str) -> Reply:
        """Ask for one reply, again and again where that may help.

        Args:
            request: without the model's name.
            blame: how to fix a request that the server refuses as it is.
        """
        import httpx2

        body = json.dumps({"model": self.model_name, **request}).encode()
        wait, pause, reply = FIRST_WAIT_S, 0.0, Reply("stopped", lost="no reply")
        for _ in range(self.tries):
            if self.stop.wait(pause):
                break
            after = None
            try:
                response = self.client.post(self.url, content=body)
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                reply = Reply(self._hidden(f"{type(error).__name__}: {error}"), lost="no reply")
            else:
                reply, after = self._judged(response, blame)
            if reply.lost != "no reply":
                break
            # Spread, so that those who failed together do not come back together.
            pause = wait * random.uniform(0.5, 1) if after is None else min(after, self.longest_told)
            wait = min(2 * wait, LONGEST_WAIT_S)
        return reply

    def _judged(self, response: httpx2.Response, blame: str) -> tuple[Reply, float | None]:
        """Return the reply, or why there is none, and the seconds that the server asks to wait, if it does.

        Raises:
            UserError: no further try, and no other job, would get a reply.
        """
        status, after = response.status_code, response.headers.get("retry-after", "")
        if status in PASSING or status >= 500:
            seconds = float(after) if after.isascii() and after.isdecimal() else None
            return Reply(f"{status} {self._said(response)}", lost="no reply"), seconds
        if status != 200:
            self.stop.set()
            raise self._refused(response, blame)
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

    def _refused(self, response: httpx2.Response, how: str) -> UserError:
        """Make the error of an answer that no further try can change."""
        status, key = response.status_code, self.key_variable or USUAL_KEY_VARIABLE
        if status in (401, 403):
            named = f"name the variable that holds the key with {self.flags}key_variable"
            how = f"check the key in {key}" if self.key else named
        elif status == 404:
            how = f"check the URL (it ends in /v1 with most servers) and {self.flags}model_name {self.model_name}"
        elif 300 <= status < 400:
            how = f"give the address itself ({response.headers.get('location', 'it names none')})"
        said = f"the server answers {status} {self._said(response)}"
        return UserError(f"{self.flags}endpoint {self.endpoint}: {said}; {how}", everywhere=False)

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
