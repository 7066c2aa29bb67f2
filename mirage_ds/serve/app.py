"""The routes; every error is OpenAI's error object."""

import hmac
import logging
import os
import time
from asyncio import Semaphore, get_running_loop, timeout
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from mirage_ds.evaluate.decoder import Decoder
from mirage_ds.serve.answers import Reply
from mirage_ds.serve.body import Refused, read_body
from mirage_ds.serve.engine import Engine, Job
from mirage_ds.serve.prompt import Reader
from mirage_ds.serve.spec import KEY_VARIABLE, ServeSpec

# Prompts that are being encoded or wait encoded, at a time: their pixels take memory. Threads that encode: each keeps
# memory of its own.
AHEAD, THREADS = 8, 2
# Seconds that a request may take to come: until then it is one of --max_requests.
BODY_S = 60
# What nginx writes down for a client that went away.
GONE = 499
# Where a request keeps its Job.
JOB = "mirage_ds.job"
# Seconds between the end of what still runs after --grace and that of the connections.
PARTING_S = 10
# Longer than clients keep a connection (openai's 5 s): a request may not meet one that is being closed.
KEEP_ALIVE_S = 75


async def refuse(request: Request, error: Exception) -> Response:
    """Write an error as OpenAI does."""
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    elif isinstance(error, ClientDisconnect):
        error = Refused(GONE, "the client went away")
    elif not isinstance(error, Refused):
        error = Refused(500, f"{type(error).__name__}; the server's log has it")
    return JSONResponse(error.body(), error.status)


async def read_content(request: Request, most_mb: float) -> bytearray:
    """Read a request's body; Refused where it is larger than that, or does not come."""
    content = bytearray()
    try:
        async with timeout(BODY_S):
            async for part in request.stream():
                content += part
                if len(content) > most_mb * 1e6:
                    raise Refused(413, f"the request has more than {most_mb:g} MB (--max_request_mb)")
    except TimeoutError:
        raise Refused(408, f"the request was not there after {BODY_S} s") from None
    return content


class Service:
    """A model behind its routes; it belongs to one event loop.

    Args:
        scratch: an empty folder for pictures, while they are encoded.

    Raises:
        UserError: the model has no latents that --latents could replace.
    """

    def __init__(self, decoder: Decoder, spec: ServeSpec, scratch: Path):
        self.name, self.spec, self.engine = decoder.folder.name, spec, Engine(decoder, spec)
        self.reader = Reader(decoder, scratch, spec.files, spec.max_length)
        self.key = spec.api_key or os.environ.get(KEY_VARIABLE)
        self.begun, self.there = int(time.time()), 0
        self._ahead, self._threads = Semaphore(AHEAD), ThreadPoolExecutor(THREADS)
        registry = self.engine.registry
        self._requests = Counter("mirage_requests", "Requests, by HTTP status.", ["status"], registry=registry)
        self._first = Histogram("mirage_first_token_seconds", "From a request to its first token.", registry=registry)
        routes = [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        errors = dict.fromkeys((Refused, HTTPException, ClientDisconnect, Exception), refuse)
        self._inner = Starlette(routes=routes, exception_handlers=errors, lifespan=self._lifespan)

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
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start(get_running_loop())
        yield
        self.engine.join()
        self._threads.shutdown()

    def _check_key(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if self.key and not (kind.lower() == b"bearer" and hmac.compare_digest(given, self.key.encode())):
            raise Refused(401, "the key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        came = time.monotonic()
        self._check_key(request)
        if self.there > self.spec.max_requests:
            raise Refused(503, f"{self.there} requests are there (--max_requests); ask again later")
        content = await read_content(request, self.spec.max_request_mb)
        async with self._ahead:
            if await request.is_disconnected():
                raise ClientDisconnect
            job = request.scope[JOB] = await get_running_loop().run_in_executor(self._threads, self._job, content)
            del content
            self.engine.submit(job)
            first = await job.token()
        self._first.observe(time.monotonic() - came)
        reply = Reply(self.name, self.engine, job, first)
        if job.asked.stream:
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return JSONResponse(await reply.whole(request))

    def _job(self, content: bytearray) -> Job:
        asked = read_body(content, self.name, self.spec.max_new_tokens)
        most = asked.new_tokens or self.spec.max_new_tokens
        sample, question = self.reader.sample(asked.messages, most)
        # Without the pictures: an answer may take long.
        return Job(asked.model_copy(update={"messages": []}), question, [sample], len(sample.input_ids), most)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._check_key(request)
        one = {"id": self.name, "object": "model", "created": self.begun, "owned_by": "mirage-ds"}
        return JSONResponse({"object": "list", "data": [one]})

    async def health(self, _: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(generate_latest(self.engine.registry), media_type=CONTENT_TYPE_LATEST)


class Server(uvicorn.Server):
    """Serves until it is told to exit, and lets end what runs then."""

    def __init__(self, service: Service):
        # Which warns of every client that goes away amid a stream.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        self.service = service
        config = uvicorn.Config(service, log_config=None, log_level="warning", access_log=False)
        config.timeout_graceful_shutdown, config.timeout_keep_alive = service.spec.grace + PARTING_S, KEEP_ALIVE_S
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End what still runs after --grace."""
        self.service.engine.close(self.service.spec.grace)
        super().handle_exit(sig, frame)
