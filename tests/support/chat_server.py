"""A real HTTP server on this machine that speaks chat completions, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Status, headers, content.
Answer = tuple[int, dict[str, str], Any]


def said(text: Any, **choice: Any) -> Answer:
    message = {"role": "assistant", "content": text} | choice.pop("message", {})
    return 200, {}, {
        "model": "writer", "choices": [{"message": message, "finish_reason": "stop"} | choice],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }  # fmt: skip


class Fake(ThreadingHTTPServer):
    """The server; `reply` says what a request gets, `seen` keeps them all, `most` how many there were at a time.

    `read` makes a request of (path, headers, body).
    """

    daemon_threads = True

    def __init__(self, read: Callable[[str, dict[str, str], bytes], Any], reply: Callable[[Any], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Any] = []
        self.read, self.reply = read, reply
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no matter here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Fake = self.server
        request = server.read(self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append(request)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            status, headers, content = server.reply(request)
        finally:
            with server.lock:
                server.now -= 1
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(server: Fake) -> Iterator[Fake]:
    """Serve in a thread."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
