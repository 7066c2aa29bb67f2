"""A request's answers as their tokens come: text that can be sent, stops, usage, and OpenAI's two forms of a reply."""

import asyncio
import json
import time
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from starlette.requests import ClientDisconnect, Request
from tokenizers.decoders import DecodeStream

from mirage_ds.analysis.controls import bank
from mirage_ds.model.rows import Generated
from mirage_ds.serve.body import Refused
from mirage_ds.serve.engine import Engine, Job, Token


class Answer:
    """An answer so far: its text is what evaluate scores, without latents, special tokens and the blanks at its ends.

    What is given out is final: blanks, and what may begin a stop, wait for what follows.

    Attributes:
        text: so far, with the blanks at its end; finish: how it has ended, empty before.
        made: its tokens; states: what was fed (H,) at each latent.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.text, self.finish, self.made = "", "", Generated()
        self.states: list[torch.Tensor] = []
        self._stream, self._sent = DecodeStream(skip_special_tokens=True), 0

    def add(self, token: Token, last: Sequence[int]) -> str:
        """Go on with a token; return what can be sent.

        Args:
            last: tokens that end an answer, where its length does not.
        """
        self.made.ids.append(token.id)
        self.made.fed += "E" if token.state is None else "H"
        self.states += [] if token.state is None else [token.state]
        self.text += self._stream.step(self.tokenizer.backend_tokenizer, token.id) or ""
        if token.ended:
            # Of a character that was cut off the stream says nothing.
            self.text = str(self.tokenizer.decode(self.made.ids, skip_special_tokens=True))
            self.finish = "stop" if token.id in last else "length"
        self.text = self.text.lstrip()
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finish = self.text[: min(found)], "stop"
        held = 0 if self.finish else max(map(len, self.stops), default=1) - 1
        new = self.text[: max(0, len(self.text) - held)].rstrip()[self._sent :]
        self._sent += len(new)
        return new

    def blocks(self) -> list[tuple[int, torch.Tensor]]:
        """List its blocks as (place among its tokens, the states that were fed (k, H))."""
        states = iter(self.states)
        return [
            (place, torch.stack([next(states) for _ in range(k)]).detach().float().cpu())
            for place, k in self.made.blocks()
        ]


class Reply:
    """The answers to one request.

    Args:
        job: it has been submitted; first: the token that came first.
    """

    def __init__(self, name: str, engine: Engine, job: Job, first: Token):
        self.engine, self.job, self.first = engine, job, first
        tokenizer, self.asked = engine.decoder.encoder.tokenizer, job.asked
        self.answers = [Answer(tokenizer, [one for one in job.asked.stop if one]) for _ in range(job.asked.n)]
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    async def _pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Yield (answer, its new text), which may be empty, after each token until all answers have ended."""
        token = self.first
        while True:
            answer = self.answers[token.answer]
            if not answer.finish:
                text = answer.add(token, self.engine.tokens.stops)
                if answer.finish and not token.ended:
                    self.engine.cancel(self.job, token.answer)
                yield token.answer, text
            if all(answer.finish for answer in self.answers):
                await asyncio.to_thread(self._save)
                return
            token = await self.job.token()

    def _save(self) -> None:
        """Write the first answer's latents where a folder is given for them; a block that was cut short is left out."""
        spec, slots = self.engine.spec, self.engine.limits.fixed_run
        own = [states for _, states in self.answers[0].blocks() if len(states) == slots]
        if spec.latent_bank and spec.latents == "own" and own:
            bank.write(spec.latent_bank, self.job.question, torch.stack(own))

    def _usage(self) -> dict[str, Any]:
        """Count tokens; latents are the reasoning."""
        made = [token for answer in self.answers for token in answer.made.ids]
        return {
            "prompt_tokens": self.job.length,
            "completion_tokens": len(made),
            "total_tokens": self.job.length + len(made),
            "completion_tokens_details": {"reasoning_tokens": made.count(self.engine.tokens.pad)},
        }

    def _choice(self, index: int, **content: Any) -> dict[str, Any]:
        answer = self.answers[index]
        if answer.finish and self.engine.spec.return_latents:
            content["latents"] = [
                # Little-endian, whatever the machine.
                {
                    "place": place,
                    "shape": [*own.shape],
                    "float32": b64encode(own.numpy().astype("<f4").tobytes()).decode(),
                }
                for place, own in answer.blocks()
            ]
        return {"index": index, "finish_reason": answer.finish or None, "logprobs": None, **content}

    async def whole(self, request: Request) -> dict[str, Any]:
        """Return a completion.

        Raises:
            Refused: decoding failed. ClientDisconnect: nobody waits for it any more.
        """
        async for _ in self._pieces():
            if await request.is_disconnected():
                raise ClientDisconnect
        said = [{"role": "assistant", "content": one.text.rstrip(), "refusal": None} for one in self.answers]
        choices = [self._choice(index, message=message) for index, message in enumerate(said)]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield a completion as server-sent events; see whole."""
        counted = self.asked.stream_options.get("include_usage")

        def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
            body = {**self.head, "object": "chat.completion.chunk", "choices": choices}
            return f"data: {json.dumps(body | ({'usage': usage} if counted else {}))}\n\n"

        for index in range(self.asked.n):
            yield event([self._choice(index, delta={"role": "assistant", "content": ""})])
        try:
            async for index, text in self._pieces():
                if text or self.answers[index].finish:
                    yield event([self._choice(index, delta={"content": text})])
        except Refused as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if counted:
            yield event([], self._usage())
        yield "data: [DONE]\n\n"
