"""The routes; every error is OpenAI's error object."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mirage_ds.serve.answers import Reply
from mirage_ds.serve.body import Asked, Refused, read_body
from mirage_ds.serve.engine import Engine
from mirage_ds.serve.job import Job
from mirage_ds.serve.prompt import Reader
from mirage_ds.serve.spec import ServeSpec

# Prompts that are being encoded or wait encoded, at a time: their pixels take memory. Threads that encode: each keeps
# memory of its own.
AHEAD, THREADS = 8, 2
# What nginx writes down for a client that went away.
GONE = 499
# Where a request keeps its Job.
JOB = "mirage_ds.job"


async def refuse(request: Request, error: Exception) -> Response:
    """Write an error as OpenAI does."""
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    elif isinstance(error, ClientDisconnect):
        error = Refused(GONE, "the client went away")
    elif not isinstance(error, Refused):
        error = Refused(500, f"{type(error).__name__}; the server's log has it")
    return JSONResponse(error.body(), error.status)


async def read_content(request: Request, most_mb: float) -> bytes:
    """Read a request's body; Refused where it is larger than that."""
    content, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        content += part if size <= most_mb * 1e6 else b""
        # What is a little too much is read all the same: a client that still writes would not see the answer.
        if size > 4 * most_mb * 1e6:
            break
    if size > most_mb * 1e6:
        raise Refused(413, f"the request has more than {most_mb:g} MB (--max_request_mb)")
    return bytes(content)


class Service:
    """A model behind its routes; it belongs to one event loop.

    Args:
        key: what clients must send; None for nothing.
    """

    def __init__(self, name: str, engine: Engine, reader: Reader, spec: ServeSpec, key: str | None):
        self.name, self.engine, self.reader, self.spec, self.key = name, engine, reader, spec, key
        self.begun, self.there = int(time.time()), 0
        self._ahead, self._threads = asyncio.Semaphore(AHEAD), ThreadPoolExecutor(THREADS)
        registry = engine.registry
        self._requests = Counter("mirage_requests", "Requests, by HTTP status.", ["status"], registry=registry)
        self._first = Histogram("mirage_first_token_seconds", "From a request to its first token.", registry=registry)
        routes = [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        errors = dict.fromkeys((Refused, HTTPException, ClientDisconnect, Exception), refuse)
        self._inner: ASGIApp = Starlette(routes=routes, exception_handlers=errors, lifespan=self._lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Be the application. Whatever becomes of a request, it is counted, and its rows are free at the end."""
        if not scope.get("path", "").startswith("/v1/"):
            await self._inner(scope, receive, send)
            return
        status = GONE

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.there += 1
        try:
            await self._inner(scope, receive, sent)
        finally:
            self.there -= 1
            if JOB in scope:
                self.engine.cancel(scope[JOB])
            self._requests.labels(status).inc()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        self.engine.start(asyncio.get_running_loop())
        yield
        self.engine.join()
        self._threads.shutdown()

    def _check_key(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if self.key and not (kind.lower() == b"bearer" and hmac.compare_digest(given, self.key.encode())):
            raise Refused(401, "the key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        came, engine = time.monotonic(), self.engine
        self._check_key(request)
        if self.there > self.spec.max_requests:
            raise Refused(503, f"{self.there} requests are there (--max_requests); ask again later")
        content = await read_content(request, self.spec.max_request_mb)
        run = asyncio.get_running_loop().run_in_executor
        asked = await run(self._threads, read_body, content, self.name, self.spec.max_new_tokens)
        del content
        async with self._ahead:
            if await request.is_disconnected():
                raise ClientDisconnect
            job = await run(self._threads, self._job, asked)
            engine.submit(job)
            request.scope[JOB] = job
            first = await job.tokens()
        self._first.observe(time.monotonic() - came)
        reply = Reply(self.name, engine, job, asked)
        if asked.stream:
            return StreamingResponse(reply.events(first), media_type="text/event-stream")
        return JSONResponse(await reply.whole(first, request))

    def _job(self, asked: Asked) -> Job:
        most = asked.new_tokens or self.spec.max_new_tokens
        sample = self.reader.sample(asked.messages, most)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**32
        return Job(sample, len(sample.input_ids), asked.n, most, asked.sampling, seed)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._check_key(request)
        one = {"id": self.name, "object": "model", "created": self.begun, "owned_by": "mirage-ds"}
        return JSONResponse({"object": "list", "data": [one]})

    async def health(self, request: Request) -> Response:
        """GET /health: 503 once the server is stopping."""
        del request
        return JSONResponse(*(({"status": "stopping"}, 503) if self.engine.closing else ({"status": "ok"},)))

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        del request
        return Response(generate_latest(self.engine.registry), media_type=CONTENT_TYPE_LATEST)
