"""A request's answers as their tokens come: text that can be sent, stops, usage, and OpenAI's two forms of a reply."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from starlette.requests import ClientDisconnect, Request
from tokenizers.decoders import DecodeStream

from mirage_ds.serve.body import Asked, Refused
from mirage_ds.serve.engine import Engine
from mirage_ds.serve.job import Job, Token


class Answer:
    """An answer so far: its text is what evaluate scores, without latents, special tokens and the blanks at its ends.

    What is given out is final: blanks, and the beginning of a stop, wait for what follows.

    Attributes:
        finish: how it has ended, None before.
        blocks: place of the first latent among the emitted tokens, and the states (H,) that were fed, of each block.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.finish: str | None = None
        self.ids: list[int] = []
        self.blocks: list[tuple[int, list[torch.Tensor]]] = []
        self._stream, self._text, self._sent = DecodeStream(skip_special_tokens=True), "", 0

    def add(self, token: Token, last: Sequence[int]) -> str:
        """Go on with a token; return what can be sent.

        Args:
            last: tokens that end an answer, where its length does not.
        """
        if token.state is not None:
            if not self.blocks or len(self.ids) != self.blocks[-1][0] + len(self.blocks[-1][1]):
                self.blocks.append((len(self.ids), []))
            self.blocks[-1][1].append(token.state)
        self.ids.append(token.id)
        before, piece = len(self._text), self._stream.step(self.tokenizer.backend_tokenizer, token.id)
        self._text = (self._text + (piece or "")).lstrip()
        found = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stops]
        if any(at >= 0 for at in found):
            self._text, self.finish = self._text[: min(at for at in found if at >= 0)], "stop"
        elif token.ended:
            # Of a character that was cut off the stream says nothing.
            self._text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True)).lstrip()
            self.finish = "stop" if token.id in last else "length"
        held = 0 if self.finish else max((_begun(self._text, stop) for stop in self.stops), default=0)
        new = self._text[: len(self._text) - held].rstrip()[self._sent :]
        self._sent += len(new)
        return new

    def latents(self) -> list[dict[str, Any]]:
        """Write its blocks for JSON: each one's states (k, H) as base64 of float32, little-endian."""
        found = [(place, torch.stack(states).numpy().astype("<f4")) for place, states in self.blocks]
        return [
            {"place": place, "shape": list(states.shape), "float32": base64.b64encode(states.tobytes()).decode()}
            for place, states in found
        ]


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


class Reply:
    """The answers to one request.

    Args:
        job: it has been submitted.
    """

    def __init__(self, name: str, engine: Engine, job: Job, asked: Asked):
        self.engine, self.job, self.asked = engine, job, asked
        self.answers = [Answer(engine.decoder.encoder.tokenizer, asked.stops) for _ in range(job.answers)]
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    async def _pieces(self, new: Sequence[Token]) -> AsyncIterator[tuple[int, str]]:
        """Yield (answer, its new text), which may be empty, after each token until all answers have ended."""
        while True:
            for token in new:
                if (answer := self.answers[token.answer]).finish:
                    continue
                text = answer.add(token, self.engine.tokens.stops)
                if answer.finish and not token.ended:
                    self.engine.cancel(self.job, token.answer)
                yield token.answer, text
            if all(answer.finish for answer in self.answers):
                return
            new = await self.job.tokens()

    def _usage(self) -> dict[str, Any]:
        """Count tokens; latents are the reasoning."""
        made = [token for answer in self.answers for token in answer.ids]
        return {
            "prompt_tokens": self.job.length,
            "completion_tokens": len(made),
            "total_tokens": self.job.length + len(made),
            "completion_tokens_details": {"reasoning_tokens": made.count(self.engine.tokens.pad)},
        }

    def _choice(self, index: int, **content: Any) -> dict[str, Any]:
        answer = self.answers[index]
        if answer.finish and self.engine.keep:
            content["latents"] = answer.latents()
        return {"index": index, "finish_reason": answer.finish, "logprobs": None, **content}

    async def whole(self, first: Sequence[Token], request: Request) -> dict[str, Any]:
        """Return a completion.

        Args:
            first: the tokens that came first.

        Raises:
            Refused: decoding failed. ClientDisconnect: nobody waits for it any more.
        """
        texts = [""] * self.job.answers
        async for index, text in self._pieces(first):
            texts[index] += text
            if await request.is_disconnected():
                raise ClientDisconnect
        said = [{"role": "assistant", "content": text, "refusal": None} for text in texts]
        choices = [self._choice(index, message=message) for index, message in enumerate(said)]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def events(self, first: Sequence[Token]) -> AsyncIterator[str]:
        """Yield a completion as server-sent events; see whole."""
        counted = self.asked.stream_options.get("include_usage")

        def event(choices: list[dict[str, Any]], **usage: Any) -> str:
            body = {**self.head, "object": "chat.completion.chunk", "choices": choices, **usage}
            return f"data: {json.dumps(body)}\n\n"

        usage = {"usage": None} if counted else {}
        for index in range(self.job.answers):
            yield event([self._choice(index, delta={"role": "assistant", "content": ""})], **usage)
        try:
            async for index, text in self._pieces(first):
                if text or self.answers[index].finish:
                    yield event([self._choice(index, delta={"content": text})], **usage)
        except Refused as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if counted:
            yield event([], usage=self._usage())
        yield "data: [DONE]\n\n"
