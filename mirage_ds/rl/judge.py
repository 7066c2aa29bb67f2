"""The reward `judge`: an OpenAI-compatible server gives each answer a number from 0 to 1.

Imports no torch. It sees texts, no pictures.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mirage_ds.chat import Chat, Reply, read_template
from mirage_ds.config.rl import RlSettings
from mirage_ds.data.messages import HELPER_MARK, IMAGE_MARK
from mirage_ds.errors import Stopped, UserError, shown
from mirage_ds.files import check_output

SHIPPED = Path(__file__).with_name("judge.txt")
PLACES = {"{question}": "the question", "{reference}": "the right answer", "{answer}": "the answer to grade"}
# A server that asks to wait for longer is asked again after this: all ranks wait meanwhile.
LONGEST_TOLD_S = 60.0
_BLAME = "check --judge_model_name, --judge_max_new_tokens and --judge_limit_key"
_PLACE = re.compile("|".join(map(re.escape, PLACES)))
# The last line: a number, perhaps behind a word as "Score:", perhaps in bold.
_NUMBER = re.compile(r"(?:[\w ]+[:=])?\s*([01](?:\.\d+)?|\.\d+)")


def read_number(text: str) -> float | None:
    """Return the number from 0 to 1 that is the last line of a reply, None where there is none."""
    lines = text.replace("*", "").strip().splitlines() or [""]
    match = _NUMBER.fullmatch(lines[-1].strip().rstrip("."))
    number = float(match[1]) if match else 2.0
    return number if number <= 1 else None


class Judge:
    """Asks the server.

    Attributes:
        known: hash of a request → its number. Kept in the cache's folder in a file of this process, so that ranks on a
            shared file system never write the same one.
        asked: requests so far that no cache has answered.

    Raises:
        UserError: a template, a key or a cache that can be none.
    """

    def __init__(self, config: RlSettings):
        self.config, self.template = config, read_template(config.judge_prompt or SHIPPED, "--judge_prompt", PLACES)
        self.chat = Chat(
            str(config.judge_endpoint), str(config.judge_model_name), config.judge_key_variable, config.judge_parallel,
            config.judge_timeout, config.judge_tries, "--judge_", LONGEST_TOLD_S,
        )  # fmt: skip
        self.known: dict[str, float] = {}
        self.asked = 0
        cache = config.judge_cache
        if cache:
            check_output(cache, "--judge_cache", folder=True)
        self.file = cache / f"judged-{uuid.uuid4().hex}.jsonl" if cache else None
        for file in cache.glob("judged-*.jsonl") if cache else ():
            for line in file.read_text(encoding="utf-8").splitlines():
                # One that was cut off is none.
                with suppress(ValueError, TypeError):
                    key, number = json.loads(line)
                    self.known[key] = float(number)

    def close(self) -> None:
        """Ask no more."""
        self.chat.stop.set()
        self.chat.client.close()

    def rewards(
        self, answers: Sequence[tuple[dict[str, Any], str]], asked: Callable[[], bool] = lambda: False
    ) -> list[float | str]:
        """Return of each answer, given as (record, text), its number, or a sentence why it has none.

        Raises:
            UserError: the server refuses what all requests have in common, or is gone, or was asked often enough.
            Stopped: `asked` says that somebody wants it.
        """
        requests = [self._request(record, text) for record, text in answers]
        model, most = self.config.judge_model_name, self.config.judge_most
        keys = [hashlib.sha256(json.dumps([model, one]).encode()).hexdigest() for one in requests]
        missing = {key: one for key, one in zip(keys, requests, strict=True) if key not in self.known}
        self.asked += len(missing)
        if most is not None and self.asked > most:
            what = f"--judge_most {most}: {self.asked} answers are to be judged by now"
            raise UserError(f"{what}; raise it, or take fewer answers", everywhere=False)
        found: dict[str, float | str] = {}
        for key, reply in self.chat.replies(missing, lambda key: self.chat.ask(missing[key], _BLAME)):
            number = None if reply.lost else read_number(reply.text)
            found[key] = _why(reply) if number is None else number
            if number is not None:
                self._keep(key, number)
            if asked():
                raise Stopped
        return [self.known[key] if key in self.known else found[key] for key in keys]

    def _request(self, record: dict[str, Any], text: str) -> dict[str, Any]:
        question = str(record.get("text_input", "")).replace(IMAGE_MARK, "[image]")
        reference = str(record.get("text_output", "")).replace(HELPER_MARK, "") or "(not known)"
        texts = dict(zip(PLACES, (question, reference, text), strict=True))
        # In one go: what an answer says is no place.
        content = _PLACE.sub(lambda match: texts[match[0]].strip(), self.template)
        messages = [{"role": "user", "content": content}]
        return {"messages": messages, "temperature": 0, self.config.judge_limit_key: self.config.judge_max_new_tokens}

    def _keep(self, key: str, number: float) -> None:
        self.known[key] = number
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps([key, number]) + "\n")


def _why(reply: Reply) -> str:
    if reply.lost:
        return f"the judge gives no reply: {reply.text}"
    cut = ", which is cut off" if reply.cut else ""
    return f"the judge's reply{cut} does not end with a number from 0 to 1: {shown(reply.text[-80:])}"
