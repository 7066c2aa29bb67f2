"""A served model answers the real client as evaluate does, whoever is beside, and lives through what is sent to it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import caller
from support.pictures import noise
from test_generate import sharpen

from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.controls.run import run_conditions
from mirage_ds.analysis.controls.spec import CONDITIONS, ControlsSpec
from mirage_ds.analysis.controls.teach import Outcome
from mirage_ds.api import Mirage
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import Decoder, answer_records, load_decoder, run_limits
from mirage_ds.evaluate.scoring import Prediction
from mirage_ds.evaluate.spec import Sampling
from mirage_ds.model import generate as decoding
from mirage_ds.model.latents import LatentInputs
from mirage_ds.serve import app
from mirage_ds.serve.answers import Answer
from mirage_ds.serve.app import Server, Service
from mirage_ds.serve.command import listen
from mirage_ds.serve.engine import Engine, Token
from mirage_ds.serve.spec import ServeSpec

K, NEW, SEED = 3, 24, 5
DRAWN = Sampling(1.3, 0.95)


@pytest.fixture(scope="module")
def folder(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharp nano that often opens a latent block: its output matrix likes `<|latent_start|>`."""
    folder = tmp_path_factory.mktemp("models") / "served"
    sharpen(nano, folder)
    encoder = load_decoder(nano, ImageFinder(()), latents=None).encoder
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][encoder.id_of("<|latent_start|>")] *= -3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mirage": {"stage": "stage2", "latent_size": K}}))
    return folder


@pytest.fixture(scope="module")
def decoder(folder: Path, mixed: Path) -> Decoder:
    return load_decoder(folder, ImageFinder.beside(mixed, None))


@pytest.fixture(scope="module")
def records(mixed: Path) -> list[Record]:
    return scan(mixed)[0]


class Served:
    """A server that runs.

    Attributes:
        client: OpenAI's; url: with /v1; plain: for what that client does not send.
    """

    def __init__(self, port: int, key: str | None, engine: Engine):
        self.url, self.engine, self.port = f"http://127.0.0.1:{port}/v1", engine, port
        self.client = openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=0, timeout=60)
        self.plain = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def ask(self, messages: list[dict], **options: Any) -> Any:
        return self.client.chat.completions.create(model="served", messages=messages, **options)

    def row(self, state: str) -> float:
        name = f'mirage_rows{{state="{state}"}} '
        lines = self.plain.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).removeprefix(name))

    def until_idle(self) -> None:
        end = time.monotonic() + 20
        while self.row("running") + self.row("waiting"):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert 'mirage_cache_bytes{state="reserved"} 0.0' in self.plain.get("/metrics").text


@contextmanager
def serving(decoder: Decoder, scratch: Path, **flags: Any) -> Iterator[Served]:
    spec = ServeSpec(port=0, **{"max_new_tokens": NEW, "rows": 6, **flags})
    scratch.mkdir(exist_ok=True)
    with listen(spec) as listener:
        service = Service(decoder, spec, scratch)
        server = Server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(listener.getsockname()[1], spec.api_key, service.engine)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(60)
            assert not thread.is_alive()
    assert not list(scratch.iterdir())


@pytest.fixture(scope="module")
def served(decoder: Decoder, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(
        decoder, tmp_path_factory.mktemp("scratch"), files=mixed.parent, return_latents=True, max_request_mb=1
    ) as one:
        yield one


@contextmanager
def slowed(engine: Engine) -> Iterator[list[int]]:
    """Let each token take 50 ms; yields how many rows got one, each time."""
    choose, chosen = engine._choose, list[int]()

    def slowly(logits: torch.Tensor, turns: Any) -> torch.Tensor:
        time.sleep(0.05)
        chosen.append(len(logits))
        return choose(logits, turns)

    engine._choose = slowly  # type: ignore[method-assign]
    try:
        yield chosen
    finally:
        engine._choose = choose  # type: ignore[method-assign]


def data_url(picture: bytes | Path) -> str:
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def messages_of(record: Record, folder: Path, by_file: bool = False) -> list[dict]:
    """A record's question as its user sends it."""
    parts: list[dict] = []
    pictures = iter(record.image_input)
    for number, text in enumerate(record.text_input.split("<image>")):
        if number:
            place = folder / next(pictures)
            parts.append(image(f"file://{place}" if by_file else data_url(place)))
        parts += [said(text)] if text else []
    return [{"role": "user", "content": parts}]


def evaluated(decoder: Decoder, record: Record, drawn: bool = False, samples: int = 1) -> list[Prediction]:
    """What `mirage-ds evaluate` answers, one record alone."""
    limits = run_limits(decoder, NEW, 8, "trained")
    return answer_records(decoder, [record], limits, DRAWN if drawn else "greedy", 7, 1, samples=samples)


def gathered(stream: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """A stream's texts, how they ended, and its usage."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    return texts, ends, usage


def test_answers_are_evaluates_whoever_is_beside(
    served: Served, decoder: Decoder, records: list[Record], mixed: Path
) -> None:
    wanted = {
        (row, drawn): evaluated(decoder, records[row], drawn, 2 if drawn else 1)
        for row, drawn in [(0, False), (1, True), (2, False), (3, False), (4, True), (8, True), (9, False), (10, True)]
    }
    asked = [*wanted] * 3
    random.Random(1).shuffle(asked)

    async def ask(client: Any, number: int, row: int, drawn: bool) -> tuple[list[str], list[str], Any]:
        await asyncio.sleep(0.03 * number)
        options: dict[str, Any] = dict(temperature=DRAWN.temperature, top_p=DRAWN.top_p, seed=7, n=2) if drawn else {}
        messages = messages_of(records[row], mixed.parent, by_file=number % 3 == 0)
        if number % 2:
            found = await client.chat.completions.create(model="served", messages=messages, **options)
            ends = [choice.finish_reason for choice in found.choices]
            return [choice.message.content for choice in found.choices], ends, found.usage
        stream = await client.chat.completions.create(
            model="served", messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
        texts, ends, usage = gathered([chunk async for chunk in stream])
        return [texts[index] for index in sorted(texts)], [ends[index] for index in sorted(ends)], usage

    async def all_of_them() -> list:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number, *one) for number, one in enumerate(asked)))

    found = asyncio.run(all_of_them())
    stops = served.engine.tokens.stops
    for key, (texts, ends, usage) in zip(asked, found, strict=True):
        own = wanted[key]
        assert texts == [one.text for one in own]
        assert ends == ["stop" if one.ids[-1] in stops else "length" for one in own]
        assert usage.completion_tokens == sum(len(one.ids) for one in own)
        assert usage.completion_tokens_details.reasoning_tokens == sum(sum(one.runs) for one in own)
    # It is about latents, and about draws that differ.
    assert sum(len(one.runs) for own in wanted.values() for one in own) > 6
    assert all(own[0].ids != own[1].ids for (_, drawn), own in wanted.items() if drawn)
    served.until_idle()


def test_several_turns_are_the_records(served: Served, decoder: Decoder, records: list[Record], mixed: Path) -> None:
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is <image>?"},
        {"role": "assistant", "content": "A map.<|im_end|>"},
    ]
    record = replace(records[4], image_input=("in8.png", *records[4].image_input), extra={"turns_before": before})
    sent = [
        {"role": "developer", "content": [said("Be brief.")]},
        {"role": "user", "content": [said("What is "), image(data_url(mixed.parent / "in8.png")), said("?")]},
        {"role": "assistant", "content": "A map.<|im_end|>", "refusal": None},
        *messages_of(records[4], mixed.parent),
    ]  # fmt: skip
    (wanted,) = evaluated(decoder, record)
    assert served.ask(sent).choices[0].message.content == wanted.text


def states_of(block: dict) -> torch.Tensor:
    states = np.frombuffer(base64.b64decode(block["float32"]), "<f4").reshape(block["shape"])
    return torch.from_numpy(states.copy())


def test_latents_come_beside_the_answer(served: Served, decoder: Decoder, records: list[Record], mixed: Path) -> None:
    seen, mirage = 0, Mirage(decoder)
    for record in records[:4]:
        wanted = mirage.generate(
            record.text_input, [mixed.parent / one for one in record.image_input], max_new_tokens=NEW
        )
        choice = served.ask(messages_of(record, mixed.parent)).choices[0]
        assert [one["place"] for one in choice.latents] == [place for place, _ in wanted.runs]
        for one, block in zip(choice.latents, wanted.latents, strict=True):
            torch.testing.assert_close(states_of(one), block, rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen > 2


def test_latents_made_together_come_whole(decoder: Decoder, records: list[Record], mixed: Path, tmp_path: Path) -> None:
    model, drawn = decoder.loaded.model, torch.randn(K, 128, generator=torch.Generator().manual_seed(7))
    model.latent_inputs = LatentInputs(0.3 * drawn, 1)
    try:
        together = replace(decoder, encoder=replace(decoder.encoder, latent_passes=1))
        mirage, seen = Mirage(together), 0
        with serving(together, tmp_path / "s", files=mixed.parent, return_latents=True) as served:
            for record in records[:4]:
                pictures = [mixed.parent / one for one in record.image_input]
                wanted = mirage.generate(record.text_input, pictures, max_new_tokens=NEW)
                reply = served.ask(messages_of(record, mixed.parent))
                choice = reply.choices[0]
                assert (choice.message.content, reply.usage.completion_tokens) == (wanted.text, len(wanted.ids))
                assert [one["place"] for one in choice.latents] == [place for place, _ in wanted.runs]
                for one, block in zip(choice.latents, wanted.latents, strict=True):
                    torch.testing.assert_close(states_of(one), block, rtol=1e-4, atol=1e-4)
                    seen += 1
        assert seen > 1
    finally:
        model.latent_inputs = None


@pytest.fixture(scope="module")
def asked(records: list[Record]) -> list[Record]:
    """Records with a latent block, of two levels."""
    found = [records[row] for row in (0, 1, 4, 5, 8, 9)]
    return [replace(one, extra={"level": number % 2}) for number, one in enumerate(found)]


@pytest.fixture(scope="module")
def controlled(
    decoder: Decoder, asked: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Outcome]]]:
    """A bank that `mirage-ds controls` writes, and what it answers."""
    bank, limits = tmp_path_factory.mktemp("bank"), run_limits(decoder, NEW, 8, "trained")
    bench = Bench(decoder.loaded.model, decoder.tower, decoder.latent_encoder("stage2", K), limits)
    spec = ControlsSpec(data_path=Path(), seed=SEED, latent_bank=bank)
    return bank, run_conditions(bench, asked, [name for name in CONDITIONS if name != "oracle"], spec)[0]


def all_at_once(served: Served, questions: Sequence[list[dict]], seed: int = 0) -> list[Any]:
    """Ask questions, each twice, all together and in an order of chance, and drawn ones beside; the first answers."""
    every = [*range(len(questions))] * 2
    random.Random(seed).shuffle(every)
    with ThreadPoolExecutor(len(every) + 1) as pool:
        pool.submit(served.ask, questions[0], temperature=1.5, n=4, max_tokens=9)
        found = {number: pool.submit(served.ask, questions[number]) for number in every}
        return [found[number].result() for number in range(len(questions))]


@pytest.mark.parametrize("latents", ["first", "zero", "random", "matched", "swap", "off", "text"])
def test_other_latents_are_those_of_the_controls(
    decoder: Decoder, asked: list[Record], controlled: tuple[Path, dict[str, list[Outcome]]], mixed: Path,
    tmp_path: Path, latents: str,
) -> None:  # fmt: skip
    bank, outcomes = controlled
    given = {"latent_bank": bank} if latents in ("random", "matched", "swap") else {}
    questions = [messages_of(one, mixed.parent) for one in asked]
    with serving(decoder, tmp_path / "s", latents=latents, seed=SEED, return_latents=True, **given) as served:
        found = all_at_once(served, questions)
        served.until_idle()
        assert not served.engine._known
    for one, outcome in zip(found, outcomes[latents], strict=True):
        (choice,), wanted = one.choices, outcome.answer
        assert (choice.message.content, one.usage.completion_tokens) == (wanted.text, len(wanted.ids))
        assert one.usage.completion_tokens_details.reasoning_tokens == sum(wanted.runs)
    fed = [states_of(block) for one in found for block in one.choices[0].latents]
    assert bool(fed) == (latents != "off")
    # Else any condition would do.
    assert [one.answer.ids for one in outcomes[latents]] != [one.answer.ids for one in outcomes["own"]]


def test_a_server_writes_a_bank_whoever_comes_first(
    decoder: Decoder, asked: list[Record], mixed: Path, tmp_path: Path
) -> None:
    questions, runs = [messages_of(one, mixed.parent) for one in asked], []
    for number in range(2):
        bank = tmp_path / f"bank{number}"
        with serving(decoder, tmp_path / "s", latent_bank=bank, return_latents=True) as served:
            own = all_at_once(served, questions[:5], number)
        files = {file.name: load_file(file)["latents"] for file in bank.iterdir()}
        with serving(decoder, tmp_path / "s", latents="swap", latent_bank=bank, return_latents=True) as served:
            runs.append((own, files, all_at_once(served, questions)))
    (own, files, swapped), (_, others, again) = runs
    assert files.keys() == others.keys()
    blocks = [[states_of(block) for block in one.choices[0].latents] for one in own]
    # A block that max_tokens cut short is none.
    whole = {number: [one for one in found if len(one) == K] for number, found in enumerate(blocks) if found}
    assert len(files) == len(whole) > 2
    # Each question was asked twice: its twin may have ended first, beside other rows, which the last bits show.
    near = partial(torch.allclose, rtol=1e-4, atol=1e-4)
    for name, latents in files.items():
        torch.testing.assert_close(latents, others[name], rtol=1e-4, atol=1e-4)
        assert sum(near(latents[0], found[0]) for found in whole.values()) == 1
    assert [one.choices[0].message for one in swapped] == [one.choices[0].message for one in again]
    partners = {}
    for number, one in enumerate(swapped):
        if one.choices[0].latents:
            first = states_of(one.choices[0].latents[0])
            (partners[number],) = (other for other, found in whole.items() if near(first, found[0]))
    # A question that was not asked before gets somebody's too.
    assert 5 in partners
    assert {partners[number] for number in whole} == {*whole}
    assert all(number != other for number, other in partners.items())


def test_chance_is_as_long_as_what_it_replaces(decoder: Decoder, records: list[Record], tmp_path: Path) -> None:
    question, own = (
        messages_of(records[1], tmp_path),
        Mirage(decoder).generate(records[1].text_input, max_new_tokens=NEW),
    )
    with serving(decoder, tmp_path / "s", latents="random", return_latents=True) as served:
        first, again = (served.ask(question).choices[0] for _ in range(2))
    assert (first.message.content, first.latents) == (again.message.content, again.latents)
    states = torch.cat([states_of(one) for one in first.latents])
    torch.testing.assert_close(states[0].norm(), own.latents[0][0].norm())
    assert len({tuple(one.tolist()) for one in states}) == len(states)


def test_pause_tokens_are_fed_as_evaluate_feeds_them(
    decoder: Decoder, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evaluated(decoder, records[1])[0].text
    monkeypatch.setitem(decoder.loaded.config.mirage, "slots", "pause")
    wanted = evaluated(decoder, records[1])[0].text
    with serving(decoder, tmp_path / "s") as served:
        assert served.ask(messages_of(records[1], tmp_path)).choices[0].message.content == wanted != own
    with pytest.raises(UserError, match="trained with --slots pause: its answers see no latents"):
        Engine(decoder, ServeSpec(latents="zero"))
    with pytest.raises(UserError, match="trained without latents"):
        Engine(replace(decoder, latents=False), ServeSpec(latents="zero"))


def png_of_size(width: int, height: int) -> bytes:
    """A small file whose header says so."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 100)) + part(b"IEND", b"")


def test_what_cannot_be_answered_is_said(served: Served, mixed: Path, tmp_path: Path) -> None:
    (mixed.parent / "link.png").symlink_to(noise((56, 56), 80).save(tmp_path / "out.png") or tmp_path / "out.png")
    outside = os.path.relpath(tmp_path / "out.png", mixed.parent)
    text = {"role": "user", "content": "What?"}

    def shows(url: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [image(url)]}]}

    large, huge, broken = (
        png_of_size(9_000, 9_900),
        png_of_size(100_000, 100_000),
        (mixed.parent / "in0.png").read_bytes()[:400],
    )
    table: list[tuple[Any, int, str]] = [
        (b'{"messages": [', 400, "Invalid JSON"),
        (b"\xff\xfe", 400, "Invalid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "hex escape"),
        (b"[" * 5_000, 400, "the request"),
        (b"[1]", 400, "the request"),
        ({}, 400, "messages: Field required"),
        ({"messages": []}, 400, "messages: List should have at least 1"),
        ({"messages": [text], "top_k": 5}, 400, "top_k: is not known here"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [said("a") | image("b")["image_url"]]}]}, 400, "url: is not known"),
        ({"messages": [text, {"role": "assistant", "content": "A"}]}, 400, "the last message is not the user's"),
        ({"messages": [text, text]}, 400, "take turns"),
        ({"messages": [{"role": "user", "content": "an <image> here"}]}, 400, "a text holds <image>"),
        ({"messages": [{"role": "user", "content": "an <output_image>"}]}, 400, "messages 1: holds latents"),
        ({"messages": [text], "n": 3}, 400, "n 3 without a temperature"),
        ({"messages": [text], "temperature": 3}, 400, "temperature"),
        ({"messages": [text], "temperature": float("nan")}, 400, "temperature"),
        ({"messages": [text], "max_tokens": NEW + 1}, 400, f"at most {NEW} tokens"),
        ({"messages": [text], "seed": 2**70}, 400, "seed"),
        ({"messages": [text], "stop": ["a"] * 17}, 400, "stop"),
        ({"messages": [text], "stop": "a" * 201}, 400, "stop"),
        ({"messages": [text], "model": "gpt"}, 404, "no model 'gpt'; served is served"),
        ({"messages": [{"role": "user", "content": "left " * 130_000}]}, 400, "40625 prompt tokens"),
        ({"messages": [{"role": "user", "content": "left " * 40_000}]}, 400, "more than 32768"),
        ({"messages": [{"role": "user", "content": [image("")] * 11_000}]}, 400, "33000 prompt tokens"),
        ({"messages": [{"role": "user", "content": [image(data_url(large))] * 5}]}, 400, "together"),
        ({"messages": [text], "k" * 9_000: 1}, 400, "is not known here"),
        ({"messages": [{"role": "user", "content": [{"type": "k" * 9_000}]}]}, 400, "messages.0.content"),
        ({"messages": [text], "n": True}, 400, "n: Input should be a valid integer"),
        ({"messages": [text], "max_tokens": "8"}, 400, "max_tokens: Input should be a valid integer"),
        ({"messages": [text], "temperature": True}, 400, "temperature: Input should be a valid number"),
        ({"messages": [text], "stream": "yes"}, 400, "stream: Input should be a valid boolean"),
        (shows(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 400, "is no PNG, JPEG, GIF"),
        ({"messages": [{"role": "user", "content": "x" * 1_100_000}]}, 413, "more than 1 MB (--max_request_mb)"),
        (shows("https://example.org/a.png"), 400, "nothing is fetched"),
        (shows("/etc/passwd"), 400, "nothing is fetched"),
        (shows("data:image/png;base64,@@@@"), 400, "picture 1 is not whole base64"),
        (shows("data:text/plain,hello"), 400, "picture 1 is a data: URI without base64"),
        (shows(data_url(broken)), 400, "image picture 1 cannot be decoded"),
        (shows(data_url(huge)), 400, "image picture 1 has more than"),
        (shows(data_url(png_of_size(2_000, 4))), 400, "a side ratio above 200"),
        *((shows(url), 400, "no file below the folder of --files") for url in (
            "file:///etc/passwd", f"file://{mixed.parent}/../{(tmp_path / 'x').name}", f"file://{outside}",
            f"file://{mixed.parent}/link.png", "file://link.png", f"file://{mixed.parent}", "file://in0.png%00",
            f"file://{'x' * 5000}",
        )),
    ]  # fmt: skip
    for body, status, says in table:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = served.plain.post("/v1/chat/completions", content=content)
        assert (answer.status_code, says) == (status, says if says in answer.text.replace("\\", "") else answer.text)
        assert {*answer.json()["error"]} == {"message", "type", "param", "code"}
        assert str(tmp_path) not in answer.text
        assert len(answer.text) < 1_000
    assert served.plain.get("/v1/other").status_code == 404
    assert served.plain.get("/v1/chat/completions").json()["error"]["message"].endswith("Method Not Allowed")
    with pytest.raises(openai.BadRequestError, match="<image>"):
        served.ask([{"role": "user", "content": "<image>"}])
    assert served.plain.get("/health").json() == {"status": "ok"}
    served.until_idle()


def test_a_request_that_does_not_come_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.1)
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"n": ')
        slow.settimeout(20)
        assert slow.recv(99).startswith(b"HTTP/1.1 408")


def test_a_key_is_asked_for(decoder: Decoder, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "What?"}]
    with serving(decoder, tmp_path / "s", api_key="clé") as served:
        for key in ("none", "clé2", "cl"):
            for path in ("/v1/models", "/v1/chat/completions"):
                answer = served.plain.request(
                    "GET" if "models" in path else "POST", path, headers={"Authorization": f"Bearer {key}".encode()}
                )
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert served.plain.get("/health").status_code == 200
        told = {"Authorization": "Bearer clé".encode()}
        assert served.plain.get("/v1/models", headers=told).json()["data"][0]["id"] == "served"
        answer = served.plain.post("/v1/chat/completions", headers=told, json={"messages": question})
        assert answer.status_code == 200
        refused = served.plain.post(
            "/v1/chat/completions", headers=told,
            json={"messages": [{"role": "user", "content": [image("file:///etc/passwd")]}]},
        )  # fmt: skip
        assert "there is no --files" in refused.json()["error"]["message"]


def test_stops_end_an_answer(served: Served, decoder: Decoder, records: list[Record], mixed: Path) -> None:
    for row in (1, 4):
        (wanted,), question = evaluated(decoder, records[row]), messages_of(records[row], mixed.parent)
        for stop in (wanted.text[3:5], wanted.text[-2:], "never there"):
            text = wanted.text.partition(stop)[0].rstrip()
            whole = served.ask(question, stop=[stop, "nor this"]).choices[0]
            texts, ends, _ = gathered(served.ask(question, stop=stop, stream=True))
            assert (texts[0], ends[0]) == (whole.message.content, whole.finish_reason) == (text, ends[0])
            assert ends[0] == "stop" or stop not in wanted.text
    served.until_idle()


def test_pieces_of_a_text_are_the_text(decoder: Decoder) -> None:
    tokenizer, draw = decoder.encoder.tokenizer, random.Random(3)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 40))]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        at = draw.randrange(len(whole) + 1)
        stop = whole.strip()[at : at + draw.randrange(1, 6)]
        answer, pieces = Answer(tokenizer, [stop] if stop else []), []
        for place, token in enumerate(ids):
            pieces.append(answer.add(Token(0, token, place == len(ids) - 1, None), ()))
            if answer.finish:
                break
        wanted = whole.lstrip()
        # A stop that ends with half a character is not seen before the character.
        if stop and "\ufffd" not in stop:
            wanted = wanted.partition(stop)[0]
        assert "".join(pieces) == wanted.rstrip() or "\ufffd" in stop


def test_whoever_goes_away_leaves_room(served: Served, decoder: Decoder, records: list[Record], mixed: Path) -> None:
    (wanted,), question = evaluated(decoder, records[0]), messages_of(records[0], mixed.parent)
    served.until_idle()
    with slowed(served.engine) as chosen:
        stream = served.ask(question, stream=True, temperature=1.5, n=4)
        next(iter(stream))
        stream.close()
        body = json.dumps({"messages": question, "temperature": 1.5, "n": 4}).encode()
        with socket.create_connection(("127.0.0.1", served.port)) as gone:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            gone.sendall(head.encode() + body)
            time.sleep(0.2)
        assert served.ask(question).choices[0].message.content == wanted.text
        served.until_idle()
    # Eight rows that nobody waits for would take as many tokens each.
    assert sum(chosen) < 5 * NEW
    assert 'mirage_requests_total{status="499"} 1.0' in served.plain.get("/metrics").text


def test_room_is_shared(decoder: Decoder, records: list[Record], mixed: Path, tmp_path: Path) -> None:
    from mirage_ds.model.kv_cache import bytes_of_block

    lengths = [len(decoder.encoder.encode_prompt(one, 0).input_ids) for one in records]
    longest = max(range(12), key=lambda row: lengths[row])
    blocks = -(-(min(lengths) + NEW) // 64)
    assert max(lengths) + NEW > 64 * blocks
    gb = (blocks + 0.5) * bytes_of_block(decoder.loaded.model) / 1e9
    with serving(decoder, tmp_path / "s", cache_gb=gb, prefill_tokens=1, max_requests=2) as served:
        with pytest.raises(openai.BadRequestError, match="--cache_gb is") as refused:
            served.ask(messages_of(records[longest], mixed.parent))
        assert refused.value.code == "context_length_exceeded"
        short = min(range(12), key=lambda row: lengths[row])
        (wanted,), question = evaluated(decoder, records[short]), messages_of(records[short], mixed.parent)
        with slowed(served.engine), ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(served.ask, question) for _ in range(2)]
            while (served.row("running"), served.row("waiting")) != (1, 1):
                time.sleep(0.01)
            with pytest.raises(openai.InternalServerError, match="--max_requests"):
                served.ask(question)
        assert [one.result().choices[0].message.content for one in asked] == [wanted.text] * 2


def test_a_fault_ends_those_it_is_about(
    served: Served, decoder: Decoder, records: list[Record], mixed: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (wanted,), question = evaluated(decoder, records[0]), messages_of(records[0], mixed.parent)
    other = messages_of(records[1], mixed.parent)
    finite, seen = decoding.finite, []

    def not_the_first(logits: torch.Tensor) -> torch.Tensor:
        found = finite(logits)
        if len(found) == 2 and not seen:
            seen.append(1)
            found[0] = False
        return found

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "finite", not_the_first)
        first = served.ask(other, stream=True)
        second = served.ask(question, stream=True)
        with pytest.raises(openai.APIError, match="not finite"):
            gathered(first)
        assert gathered(second)[0][0] == wanted.text
    for error, status in ((RuntimeError("a bug"), 500), (torch.OutOfMemoryError("full"), 503)):
        with monkeypatch.context() as patch:
            patch.setattr(served.engine, "_choose", lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(openai.APIStatusError, match="decoding failed") as refused:
                served.ask(messages_of(records[0], mixed.parent))
        assert refused.value.status_code == status
        assert served.ask(question).choices[0].message.content == wanted.text
    assert "a bug" in caplog.text


@pytest.mark.parametrize("grace", [30, 0])
def test_a_signal_ends_it_once_answers_have_ended(
    folder: Path, grace: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: list[Any] = []

    def ask() -> None:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=40)
        stream = client.chat.completions.create(
            model="served", messages=[{"role": "user", "content": "What?"}], stream=True, temperature=2, seed=1,
        )  # fmt: skip
        chunks = [next(iter(stream))]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        # Once more: no reason to hurry.
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            chunks += [*stream]
            found.append(chunks[-1].choices[0].finish_reason)
        except openai.APIError as error:
            found.append(str(error))
        time.sleep(0.3)
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1)
            found.append("connected")

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        words = ("serve", folder, "--port", port, "--max_new_tokens", 40, "--grace", grace)
        code, out, error = caller(monkeypatch, capsys)(*words)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    thread.join(30)
    assert (code, error) == (0, "")
    assert out == f"served: http://127.0.0.1:{port}/v1\nstopped\n"
    assert found in ((["length"], ["stop"]) if grace else (["the server is stopping"],))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--files", "nowhere"), "--files is PosixPath('nowhere'): Path does not point to a directory"),
        (("--port", "70000"), "--port is 70000"),
        (("--host", "256.0.0.1"), "--host 256.0.0.1 --port 8000"),
        (("--latents", "swap"), "--latents swap is made of other questions' latents; give --latent_bank"),
        (("--latents", "oracle"), "'oracle' is not one of 'own', 'first', 'zero', 'random'"),
        (("--latents", "off", "--latent_bank", "x"), "--latents off takes nothing from --latent_bank"),
        (("--latents", "matched", "--latent_bank", "nowhere"), "--latent_bank nowhere: holds no latents"),
        (("--latent_bank", "x", "--run_length", "model"), "--run_length: conditions are compared at the same number"),
    ],
)
def test_flags_that_cannot_be(
    folder: Path, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = caller(monkeypatch, capsys, "serve", str(folder))(*words)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1


def test_without_the_extra_it_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, error = caller(monkeypatch, capsys)("serve", folder)
    said = 'mirage-ds serve needs uvicorn, which is not installed: pip install "mirage-ds[serve]"'
    assert (code, error) == (2, f"error: {said}\n")
