"""A server under load: 1,000 requests, 64 at a time, some broken, some left; its memory stays, and it ends clean."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from support.pictures import noise

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

REQUESTS, TOGETHER, NEW = 1_000, 64, 16
# Of a process that has answered a fifth of them; its heap is still settling then.
GROWTH_MB = 30
QUESTION = "Which way is the goal?"


def picture(side: int, kind: str = "PNG") -> str:
    content = io.BytesIO()
    noise((side, 84), 80, side).save(content, kind)
    return "data:image/x;base64," + base64.b64encode(content.getvalue()).decode()


def body_of(number: int, pictures: list[str]) -> dict:
    """A request; of every ten one is broken, and others are unlike."""
    draw = random.Random(number)
    shown = [draw.choice(pictures) for _ in range(draw.randrange(4))]
    if number % 10 == 7:
        shown = ["data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" * draw.randrange(1, 9)).decode()]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
    content = [*parts, {"type": "text", "text": f"{QUESTION} {'again ' * draw.randrange(40)}"}]
    more = {"temperature": 1.2, "seed": number, "n": 2} if number % 3 == 0 else {}
    return {
        "model": "nano",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": draw.randint(2, NEW),
        **more,
    }


async def load(url: str, numbers: range, pictures: list[str]) -> Counter[str]:
    """Send requests, so many at a time; of every ten one streams and is left amid the answer."""
    room, found = asyncio.Semaphore(TOGETHER), Counter()

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        async with room:
            try:
                if number % 10 == 3:
                    async with await client.chat.completions.create(**body_of(number, pictures), stream=True) as stream:
                        async for _ in stream:
                            break
                    found["left"] += 1
                else:
                    said = await client.chat.completions.create(**body_of(number, pictures))
                    assert all(choice.finish_reason for choice in said.choices)
                    found["answered"] += 1
            except openai.BadRequestError:
                found["refused"] += 1

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=100) as client:
        await asyncio.gather(*(one(client, number) for number in numbers))
    return found


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_requests(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [picture(56 + 28 * number, kind) for number, kind in enumerate(("PNG", "JPEG", "WEBP", "PNG", "GIF"))]
    words = ("-m", "mirage_ds", "serve", str(nano), "--port", "0", "--rows", "16", "--max_new_tokens", str(NEW))
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stderr is not None
        url = re.search(r"http\S+", server.stdout.readline())
        assert url
        process = psutil.Process(server.pid)
        first = asyncio.run(load(url[0], range(REQUESTS // 5), pictures))
        before, began = process.memory_info().rss / 1e6, time.monotonic()
        found = asyncio.run(load(url[0], range(REQUESTS // 5, REQUESTS), pictures))
        seconds, after = time.monotonic() - began, process.memory_info().rss / 1e6
        files = len(process.open_files()) + len(process.net_connections())
        server.send_signal(signal.SIGTERM)
        assert (server.wait(60), server.stdout.read(), server.stderr.read()) == (0, "stopped\n", "")
    finally:
        server.kill()
    with capsys.disabled():
        rate = found.total() / seconds
        print(f"\n{rate:.1f} requests/s; {before:.0f} MB after {first.total()}, {after:.0f} after {REQUESTS}; {files=}")
    assert first + found == {"answered": 800, "left": 100, "refused": 100}
    assert after - before < GROWTH_MB
