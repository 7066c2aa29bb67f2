"""`data rationalize` against a real HTTP server on this machine that speaks chat completions, and misbehaves on demand.

What arrives there and what is written is read back with plain json, base64 and PIL.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from support.chat_server import Answer, Fake, said, served
from support.commands import Call, caller

from mirage_ds import chat
from mirage_ds.curate.check import check_file
from mirage_ds.curate.rationalize import server as serving
from mirage_ds.curate.rationalize.form import read
from mirage_ds.curate.rationalize.prompt import Questions, Shown
from mirage_ds.curate.spec import RationalizeSpec
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.tasks import get_task
from mirage_ds.tasks.build import build

REASONING, PLANNING = "vsp-spatial-reasoning", "vsp-spatial-planning"
KEY = "sk-very-secret-0123456789"
NO_TEXT = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>", "<|image_pad|>")
Row = dict[str, Any]


class Request:
    """What a chat request holds, taken apart."""

    def __init__(self, path: str, headers: dict[str, str], body: bytes):
        self.path, self.headers = path, headers
        self.values = json.loads(body)
        (turn,) = self.values["messages"]
        assert turn["role"] == "user"
        self.text, self.images = "", []
        for part in turn["content"]:
            if part["type"] == "text":
                self.text += part["text"]
            else:
                kind, content = re.fullmatch(r"data:(image/\w+);base64,(.+)", part["image_url"]["url"]).groups()
                with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
                    image.load()
                    assert kind == f"image/{image.format.lower()}"
                    self.images.append(image)
                self.text += f"⟨{len(self.images)}⟩"

    @property
    def answer(self) -> str:
        return re.search(r"The right answer: (.*)", self.text)[1]


def form(answer: str, before: str = "First I look.", after: str = "Then I see it.") -> str:
    return f"<before>\n{before}\n</before>\n<after>{after}</after>\n<answer>{answer}</answer>"


def right(request: Request) -> Answer:
    return said(form(request.answer))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.001)
    with served(Fake(Request, right)) as server:
        yield server


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys, "data", "rationalize")


@pytest.fixture
def ask(call: Call, fake: Fake, tmp_path: Path) -> Call:
    """Run the command against the server, into `tmp_path`/out."""

    def run(file: Path, *arguments: object) -> tuple[int, str, str]:
        own = ("--out", tmp_path / "out", "--endpoint", fake.url, "--model_name", "writer")
        return call(file, *own, *(("-n", 1) if "-n" not in arguments else ()), *arguments)

    return run


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve reasoning rows with direct answers."""
    settings = get_task(REASONING).build_settings(
        out=tmp_path_factory.mktemp("boards"), count=12, levels=[3, 4], answer="direct", cell_size=16
    )
    return build(REASONING, settings).file


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Rows of no task: one image and helper, two of each, none in the question; other formats."""
    folder = tmp_path / "plain"
    folder.mkdir()
    noise = Image.effect_noise((40, 30), 90).convert("RGB")
    noise.save(folder / "a.png")
    noise.save(folder / "b.jpg", quality=90)
    noise.convert("RGBA").save(folder / "c.png")
    noise.save(folder / "d.gif", save_all=True, append_images=[noise.rotate(180)])
    rows: list[Row] = [
        dict(text_input="What is <image>?", text_output=r"It is \boxed{x^{2}}", image_input="a.png",
             image_output="b.jpg", level=1, note={"deep": [1]}),
        dict(text_input="<image> or <image>, {answer}?", image_input=["c.png", "a.png"],
             text_output=r"<output_image>a<output_image>\boxed{ two words }", image_output=["d.gif", "b.jpg"]),
        dict(text_input="Blind, in <think> tags?", text_output=r"\boxed{3}", image_output=["c.png"]),
    ]  # fmt: skip
    return write(folder / "rows.jsonl", *rows)


def write(path: Path, *rows: Row | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def places(row: Row, key: str, folder: Path) -> list[Path]:
    found = row.get(key, [])
    return [Path(os.path.realpath(folder / path)) for path in ([found] if isinstance(found, str) else found)]


def summary(out: Path) -> Row:
    return json.loads((out / "rationalize.json").read_text())


def others(row: Row) -> Row:
    changed = ("text_output", "rationale", "image_input", "image_output")
    return {key: value for key, value in row.items() if key not in changed}


def written(out: Path, file: Path, given: list[Row] | None = None) -> list[Row]:
    """Read data.jsonl; what holds for every one is checked: `given` are the rows it is made of."""
    rows = lines(out / "data.jsonl")
    assert check_file(out / "data.jsonl", "stage1", None, None, 1) == (len(rows), [])
    for row, old in zip(rows, lines(file) if given is None else given, strict=True):
        assert others(row) == others(old)
        for key in ("image_input", "image_output"):
            assert places(row, key, out) == places(old, key, file.parent)
            assert not any(Path(path).is_absolute() for path in ([row[key]] if isinstance(row.get(key), str) else []))
        assert row["text_output"].count("<output_image>") == len(places(old, "image_output", file.parent))
        boxed = re.search(r"\\boxed\{(.*)\}", old["text_output"])[1]
        assert row["text_output"].endswith(f"The answer is \\boxed{{{boxed}}}.")
        assert row["text_output"].count("\\boxed") == 1
    assert not list(out.parent.glob(".*partial*"))
    return rows


# ------------------------------------------------------------------------------------------------ what is asked


def test_rows_of_a_task(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    """Pictures arrive as they are, every row once; what is written passes the check and keeps its order."""
    code, told, error = ask(boards, "--temperature", 0.5, "--max_new_tokens", 99)
    assert (code, error) == (0, "")
    given = lines(boards)
    assert len(fake.seen) == len(given)
    images = Counter()
    for request in fake.seen:
        assert request.path == "/v1/chat/completions"
        assert (request.values["model"], request.values["temperature"], request.values["max_tokens"]) == (
            "writer", 0.5, 99,
        )  # fmt: skip
        assert "seed" not in request.values
        images[tuple(image.tobytes() for image in request.images)] += 1
    expected = Counter()
    for row in given:
        both = places(row, "image_input", boards.parent) + places(row, "image_output", boards.parent)
        expected[tuple(Image.open(path).convert("RGB").tobytes() for path in both)] += 1
    assert images == expected
    rows = written(tmp_path / "out", boards)
    template = (Path(serving.__file__).parent / "prompt.txt").read_text().strip()
    for row in rows:
        assert row["text_output"].startswith("First I look.\n<output_image>\nThen I see it.\nThe answer is")
        assert row["rationale"] == {
            "model": "writer", "sample": 0, "temperature": 0.5, "max_new_tokens": 99, "seed": None,
            "prompt": hashlib.sha256(template.encode()).hexdigest(),
        }  # fmt: skip
    found = summary(tmp_path / "out")
    assert found["counts"]["accepted"] == sum(found["counts"].values()) == 12
    assert found["tokens"] == {"asked": 84, "written": 36}
    assert found["prompt"] == template
    assert re.search(r"accepted +│ +12", told)


def test_pictures_places_and_answers(ask: Call, fake: Fake, plain: Path, tmp_path: Path) -> None:
    """Several images and helpers, marks in the question, a box with braces, think tags."""
    fake.reply = lambda request: said(
        form(f"\\boxed{{{request.answer}}}")
        if "<between>" not in request.text
        else "<think>try <before>x</before></think><before>p</before><between>q <think>r</between>"
        "<after>s</after> <answer> two  words</answer>"
    )
    template = tmp_path / "t.txt"
    template.write_text("Q {question} pics <image> helpers <helper>\nThe right answer: {answer}\n{other}")
    code, _, error = ask(plain, "--prompt", template, "--parallel", 1)
    assert (code, error) == (0, "")
    one, two, three = fake.seen
    assert one.text.startswith(
        "Q What is [image]? pics ⟨1⟩ helpers ⟨2⟩\nThe right answer: x^{2}\n{other}\n\nReply with"
    )
    assert two.text.startswith(
        "Q [image 1] or [image 2], {answer}? pics [image 1] ⟨1⟩[image 2] ⟨2⟩ "
        "helpers [helper image 1] ⟨3⟩[helper image 2] ⟨4⟩\nThe right answer:  two words \n"
    )
    assert re.findall(r"<(\w+)>", two.text.split("Reply")[1]) == ["before", "between", "after", "answer"]
    assert three.text.startswith("Q Blind, in <think> tags? pics (none) helpers ⟨1⟩")
    # The file's own bytes where all see the same in them; else what the trainer sees: RGB, the first picture.
    assert [image.format for image in one.images + two.images] == ["PNG", "JPEG", "PNG", "PNG", "PNG", "JPEG"]
    assert {image.mode for image in one.images + two.images} == {"RGB"}
    noise = Image.open(plain.parent / "a.png")
    assert ImageChops.difference(two.images[0], noise).getbbox() is None
    rows = written(tmp_path / "out", plain)
    assert rows[1]["text_output"] == ("p\n<output_image>\nq r\n<output_image>\ns\nThe answer is \\boxed{ two words }.")
    assert rows[2]["text_output"] == (
        "<think> First I look. </think><output_image><think> Then I see it. </think>The answer is \\boxed{3}."
    )


def test_pictures_are_what_the_trainer_sees(tmp_path: Path) -> None:
    """The file's bytes only where nobody can see anything else in them."""
    noise = Image.effect_noise((40, 30), 90).convert("RGB")
    noise.save(tmp_path / "plain.png")
    noise.save(tmp_path / "plain.jpg")
    noise.convert("L").save(tmp_path / "grey.png")
    noise.save(tmp_path / "moving.png", save_all=True, append_images=[noise.rotate(180)])
    noise.save(tmp_path / "clear.png", transparency=noise.getpixel((3, 3)))
    noise.convert("RGBA").save(tmp_path / "alpha.png")
    noise.convert("P").save(tmp_path / "palette.png")
    noise.save(tmp_path / "a.webp", lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    noise.save(tmp_path / "turned.jpg", exif=turned)
    finder = ImageFinder.beside(tmp_path / "r.jsonl", None)
    same = set()
    for path in sorted(tmp_path.iterdir()):
        record = Record(1, "", "", (path.name,), ())
        content = base64.b64decode(
            serving.data_url(finder, record, Shown("image_input", path.name), None).split(",")[1]
        )
        same |= {path.name} if content == path.read_bytes() else set()
        wanted = finder.load(record, "", path.name)
        with Image.open(io.BytesIO(content)) as sent:
            assert (getattr(sent, "n_frames", 1), sent.getexif().get(0x0112, 1), sent.size) == (1, 1, wanted.size)
            assert "transparency" not in sent.info
            assert ImageChops.difference(sent.convert("RGB"), wanted).getbbox() is None
    assert same == {"plain.png", "plain.jpg", "grey.png"}


def test_large_pictures_are_made_smaller(ask: Call, fake: Fake, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (9, 8, 7)).save(tmp_path / "a.png")
    file = write(tmp_path / "r.jsonl", {"text_input": "?", "text_output": "\\boxed{1}", "image_output": "a.png"})
    assert ask(file, "--max_pixels", 5000)[0] == 0
    (image,) = fake.seen[0].images
    assert image.size == (100, 50)
    assert image.getcolors() == [(5000, (9, 8, 7))]


def test_a_folder_of_records_is_taken(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    assert ask(boards.parent)[0] == 0
    written(tmp_path / "out", boards, lines(boards))


def test_samples_are_rows(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    """Three replies a row by default; more samples later ask for the rest only."""
    fake.reply = lambda request: said(form(request.answer, after=f"Number {len(fake.seen)}."))
    out, given = tmp_path / "out", lines(boards)
    assert ask(boards, "-n", 2, "--seed", 5)[0] == 0
    rows = written(out, boards, [row for row in given for _ in range(2)])
    assert [row["rationale"]["sample"] for row in rows] == [0, 1] * 12
    assert len({request.values["seed"] for request in fake.seen}) == len(fake.seen) == 24
    first = {request.values["seed"] for request in fake.seen}
    assert ask(boards, "-n", 3, "--seed", 5)[0] == 0
    assert len(fake.seen) == 36
    assert not first & {request.values["seed"] for request in fake.seen[24:]}
    more = written(out, boards, [row for row in given for _ in range(3)])
    assert [row for row in more if row["rationale"]["sample"] < 2] == rows


# ---------------------------------------------------------------------------------------------- what is dropped


def test_dropped_replies_are_counted(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    """One row of each kind; the first example of each is kept."""
    other = {"A": "B", "B": "C", "C": "A"}
    kinds: Iterator[Callable[[Request], Answer]] = iter([
        right,
        lambda r: said(form(other[r.answer])),  # wrong
        lambda r: said(form(r.answer, after=f"So \\boxed{{{other[r.answer]}}}")),  # its reasoning says otherwise
        lambda r: said("I would rather not."),
        lambda r: said("<before>a</before><answer>" + r.answer + "</answer>"),
        lambda r: said(form(r.answer, before="a <output_image> b")),
        lambda r: said(form(r.answer, before=" … ")),
        lambda r: said(form(r.answer, after="")),
        lambda r: said(form(r.answer)[:30], finish_reason="length"),
        lambda r: said("", finish_reason="content_filter"),
        lambda r: said(None, message={"refusal": "I can't."}),
        lambda r: said(form(r.answer, after="half \ud800")),
    ])  # fmt: skip

    def reply(request: Request) -> Answer:
        return next(kinds)(request)

    fake.reply = reply
    code, told, error = ask(boards, "--parallel", 1)
    assert (code, error) == (0, "")
    found = summary(tmp_path / "out")
    assert found["counts"] == {
        "accepted": 1, "wrong answer": 2, "no form": 4, "empty part": 2, "cut off": 1, "refused": 2, "no reply": 0,
    }  # fmt: skip
    assert {kind: example["line"] for kind, example in found["examples"].items()} == {
        "accepted": 1, "wrong answer": 2, "no form": 4, "empty part": 7, "cut off": 9, "refused": 10,
    }  # fmt: skip
    assert found["examples"]["no form"]["said"] == "I would rather not."
    assert (found["rows"], found["rows with a rationale"]) == (12, 1)
    written(tmp_path / "out", boards, lines(boards)[:1])
    for kind, count in (("wrong answer", 2), ("no form", 4), ("refused", 2)):
        assert re.search(rf"{kind}: .*│ +{count} ", told)
    # All of them are decided: nothing is asked again.
    assert ask(boards)[0] == 0
    assert len(fake.seen) == 12


def test_nothing_accepted(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    fake.reply = lambda request: said("no" if len(fake.seen) > 2 else form("D"))
    code, told, error = ask(boards, "--parallel", 1)
    assert code == 2
    assert error == (
        "error: none of 12 replies was accepted, 10 of them for this: the reply has not the form that the prompt asks "
        f"for; {tmp_path}/out/rationalize.json has an example\n"
    )
    assert "wrong answer" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rationalize.json", "replies.jsonl"]


def test_another_right_answer_is_not_the_rows(ask: Call, fake: Fake, tmp_path: Path) -> None:
    """The helper draws the row's own path; the scorer alone would take the other one too."""
    Image.new("RGB", (9, 9)).save(tmp_path / "h.png")
    board = {"map_desc": [[1, 0], [0, 2]], "image_output": "h.png", "text_input": "?", "task": PLANNING}
    own = {"text_output": "\\boxed{RIGHT, DOWN}"}
    file = write(tmp_path / "r.jsonl", board | own, board | own)
    assert get_task(PLANNING).score_record("\\boxed{DOWN, RIGHT}", board | own)["success"]
    fake.reply = lambda request: said(form("down, right" if len(fake.seen) == 1 else "right down"))
    assert ask(file, "--parallel", 1)[0] == 0
    assert summary(tmp_path / "out")["counts"]["wrong answer"] == 1
    # In the row's own words.
    assert lines(tmp_path / "out/data.jsonl")[0]["text_output"].endswith("The answer is \\boxed{RIGHT, DOWN}.")


def test_a_task_of_ones_own(
    ask: Call, fake: Fake, plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its scorer decides, whatever is in the box; a part of the score is not right."""
    (tmp_path / "own_rational.py").write_text(
        "from mirage_ds.tasks.task import Task\n"
        "class Mine(Task):\n"
        "    def prompt(self, row, settings): return ''\n"
        "    def parse(self, text, row): return 'x'\n"
        "    def score_record(self, text, record):\n"
        "        return {'share': 0.5 if 'half' in text else 1.0 * ('bad' not in text)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file = write(plain, *[lines(plain)[0]] * 3)
    answers = iter(("bad", "half", "fine"))
    fake.reply = lambda request: said(form(next(answers)))
    assert ask(file, "--task", "own_rational:Mine", "--parallel", 1)[0] == 0
    assert summary(tmp_path / "out")["counts"]["wrong answer"] == 2
    assert summary(tmp_path / "out")["examples"]["accepted"]["line"] == 3


@pytest.mark.parametrize(
    ("text", "helpers", "expected"),
    [
        ("<before>a</before><after>b</after><answer>c</answer>", 1, (["a", "b"], "c")),
        ("Sure!\n<BEFORE>a\n\nb</BEFORE> so\n<After>c</After>\n<answer>\nd\n</answer> Bye", 1, (["a\n\nb", "c"], "d")),
        ("<think>I write <before>x</before></think><before>a</before><after>b</after><answer>c</answer>", 1,
         (["a", "b"], "c")),
        ("<before>a</before><between>b</between><after>c</after><answer>d</answer>", 2, (["a", "b", "c"], "d")),
        ("<before>a</before><between>b</between><after>c</after><answer>d</answer>", 1, None),
        ("<before>a</before><after>c</after><answer>d</answer>", 2, None),
        ("<after>b</after><before>a</before><answer>c</answer>", 1, None),
        ("<before>a<after>b</after><answer>c</answer>", 1, None),
        ("<before>a</before><after>b<answer>c</answer></after>", 1, None),
        ("<before>a</before><after>b</after>", 1, None),
        ("", 1, None),
    ],
)  # fmt: skip
def test_form(text: str, helpers: int, expected: tuple[list[str], str] | None) -> None:
    assert read(text, helpers) == expected


# ------------------------------------------------------------------------------------------- a server's misbehaviour


def test_failures_that_pass(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    """Each row fails some times, in another way, and is written in the end."""
    bad: list[Answer] = [
        (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
        (500, {}, b"oops"),
        (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""),
        (200, {}, b"{half"),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": None}}]}),
        (200, {}, [1]),
    ]
    asked: Counter[bytes] = Counter()

    def reply(request: Request) -> Answer:
        with fake.lock:
            known = b"".join(image.tobytes() for image in request.images) + request.text.encode()
            asked[known] += 1
            tries, number = asked[known], list(asked).index(known)
        return right(request) if tries > number % 4 else bad[(number + tries) % len(bad)]

    fake.reply = reply
    code, _, error = ask(boards, "--parallel", 4, "--tries", 4)
    assert (code, error) == (0, "")
    assert list(asked.values()) == [number % 4 + 1 for number in range(12)]
    written(tmp_path / "out", boards)


def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch, boards: Path, fake: Fake, tmp_path: Path) -> None:
    """What the server asks for, else twice as long each time, within a bound, and never longer than that."""
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 4.0)
    spec = RationalizeSpec(out=tmp_path, endpoint=fake.url, model_name="w", tries=9)
    server = serving.Server(Questions.read(boards, spec))
    waits: list[float] = []
    monkeypatch.setattr(server.chat.stop, "wait", lambda seconds: waits.append(seconds) if seconds else False)
    told = ("7", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 99)
    headers = iter([*({"Retry-After": text} for text in told), *[{}] * 6])
    fake.reply = lambda request: (429, next(headers), b"")
    reply = server.ask((0, 0))
    assert (reply.text, reply.lost) == ("429 (Too Many Requests)", "no reply")
    assert len(waits) == 8
    assert (waits[0], waits[2]) == (7, 3600)
    for wait, most in zip((waits[1], *waits[3:]), (8, 32, 60, 60, 60, 60), strict=True):
        assert most / 2 <= wait <= most


@pytest.mark.parametrize(
    ("status", "headers", "hint"),
    [
        (401, {}, "check the key in MY_KEY"),
        (403, {}, "check the key in MY_KEY"),
        (404, {}, "--model_name writer"),
        (400, {}, "--max_pixels"),
        (422, {}, "--limit_key"),
        (302, {"Location": "http://elsewhere/v1"}, "give the address itself (http://elsewhere/v1)"),
    ],
)
def test_what_no_try_can_change_stops_at_once(
    ask: Call, fake: Fake, boards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    status: int, headers: dict[str, str], hint: str,
) -> None:  # fmt: skip
    """One sentence with what the server says, the key in it hidden, and the key nowhere on the disk."""
    monkeypatch.setenv("MY_KEY", KEY)
    fake.reply = lambda request: (status, headers, {"error": {"message": f"Bad\nkey {'x' * 180} {KEY}"}})
    code, told, error = ask(boards, "--key_variable", "MY_KEY", "--parallel", 2)
    assert (code, told) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", error)
    assert f"the server answers {status} (Bad key xxx" in error
    assert hint in error
    assert len(fake.seen) <= 2
    assert fake.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    # Not even a part of it, where the message is cut.
    assert KEY[:5] not in error + "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_the_key_is_sent_and_never_written(
    ask: Call, fake: Fake, boards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(boards, "--most", 1)[0] == 0
    assert "Authorization" not in fake.seen[0].headers
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fake.reply = lambda request: right(request) if len(fake.seen) % 2 else (500, {}, KEY.encode())
    code, told, error = ask(boards, "--tries", 1, "--parallel", 1)
    assert (code, error) == (0, "")
    assert {request.headers["Authorization"] for request in fake.seen[1:]} == {f"Bearer {KEY}"}
    assert "[key]" in (tmp_path / "out/replies.jsonl").read_text()
    assert KEY not in told + "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nand more")
    code, _, error = ask(boards)
    assert (code, KEY in error) == (2, False)


def test_a_lost_row_is_asked_again(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    fake.reply = lambda request: (500, {}, b"") if len(fake.seen) in (2, 3, 4) else right(request)
    assert ask(boards, "--parallel", 1, "--tries", 3)[0] == 0
    assert summary(tmp_path / "out")["counts"]["no reply"] == 1
    assert summary(tmp_path / "out")["examples"]["no reply"] == {
        "line": 2, "sample": 0, "said": "500 (Internal Server Error)",
    }  # fmt: skip
    given = lines(boards)
    written(tmp_path / "out", boards, [given[0], *given[2:]])
    assert len(fake.seen) == 14
    assert ask(boards)[0] == 0
    assert len(fake.seen) == 15
    written(tmp_path / "out", boards)


def test_a_server_that_is_gone(call: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    fake.server_close()
    own = ("--out", tmp_path / "o", "--endpoint", fake.url, "--model_name", "w", "-n", 1, "--tries", 2)
    code, _, error = call(boards, *own)
    assert code == 2
    assert re.fullmatch(rf"error: --endpoint {fake.url}: no reply to 8 jobs in a row, .*ConnectError.*again.*\n", error)
    assert len(lines(tmp_path / "o/replies.jsonl")) == 9
    assert not (tmp_path / "o/data.jsonl").exists()


def test_a_slow_server_is_not_waited_for_longer_than_told(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    go = threading.Event()

    def reply(request: Request) -> Answer:
        if len(fake.seen) == 1:
            go.wait(5)
        return right(request)

    fake.reply = reply
    assert ask(boards, "--timeout", 0.2, "--parallel", 1)[0] == 0
    go.set()
    # Not exactly two: on a busy machine others may be late too.
    assert [request.text for request in fake.seen[:2]] == [fake.seen[0].text] * 2
    written(tmp_path / "out", boards)


def test_parallel_is_a_limit_and_is_reached(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    """Whoever comes waits for the others, but not for a fourth. The order is the file's all the same."""
    barrier = threading.Barrier(3)

    def reply(request: Request) -> Answer:
        at = barrier.wait(10)
        time.sleep(0.01 * at)
        return right(request)

    fake.reply = reply
    assert ask(boards, "--parallel", 3)[0] == 0
    assert fake.most == 3
    written(tmp_path / "out", boards)


# ----------------------------------------------------------------------------------------------- going on, stopping


def begin(fake: Fake, file: Path, out: Path, answered: int) -> subprocess.Popen[str]:
    """Start the command in a process of its own; return when `answered` replies are noted and others hang."""
    go = threading.Event()
    fake.reply = lambda request: right(request) if len(fake.seen) <= answered else (go.wait(300), right(request))[1]
    argv = [sys.executable, "-m", "mirage_ds", "data", "rationalize", str(file), "--out", str(out)]
    argv += ["--endpoint", fake.url, "--model_name", "writer", "-n", "1", "--parallel", "2"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(fake.seen) < answered + 2 or len(lines_there(out)) <= answered:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


def lines_there(out: Path) -> list[bytes]:
    file = out / "replies.jsonl"
    return file.read_bytes().splitlines() if file.exists() else []


def test_a_killed_command_goes_on(ask: Call, fake: Fake, boards: Path, tmp_path: Path) -> None:
    """kill -9 with replies noted and half a line written: only the rest is asked, and the result is the same."""
    out = tmp_path / "out"
    process = begin(fake, boards, out, 5)
    # Two processes never write one journal.
    code, _, error = ask(boards)
    assert (code, "another process" in error) == (2, True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close(), process.stderr.close()
    before = lines_there(out)
    assert len(before) == 6
    assert not (out / "data.jsonl").exists()
    with (out / "replies.jsonl").open("ab") as file:
        file.write(b'{"row": 7, "sample": 0, "line": 8, "outcome": "accepted", "text": "<before>tor')
    answered = {request.text + str(request.images[0].tobytes()) for request in fake.seen[:5]}
    fake.seen.clear()
    fake.reply = right
    assert ask(boards)[0] == 0
    assert len(fake.seen) == 7
    assert not answered & {request.text + str(request.images[0].tobytes()) for request in fake.seen}
    assert lines_there(out)[:6] == before
    assert len(lines(out / "replies.jsonl")) == 13
    rows = written(out, boards)
    assert ask(boards)[0] == 0
    assert len(fake.seen) == 7
    # Undisturbed it is the same file.
    assert ask(boards, "--out", tmp_path / "whole")[0] == 0
    assert lines(tmp_path / "whole/data.jsonl") == rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(fake: Fake, boards: Path, tmp_path: Path, number: int) -> None:
    """Requests that hang for 300 s are not waited for."""
    process = begin(fake, boards, tmp_path / "out", 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (75, "stopped\n")
    assert len(lines(tmp_path / "out/replies.jsonl")) == 4


def test_another_command_is_refused(ask: Call, fake: Fake, boards: Path, plain: Path, tmp_path: Path) -> None:
    assert ask(boards, "--most", 2)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    # One more key, and folders begun earlier would be refused.
    keys = "FILE --prompt --model_name --temperature --max_new_tokens --seed --max_pixels --task"
    assert " ".join(lines(tmp_path / "out/replies.jsonl")[0]["setup"]) == keys
    prompt = tmp_path / "p.txt"
    prompt.write_text("{question} {answer} <image> <helper>")
    for what, file, arguments in (
        ("FILE", plain, ()), ("--prompt", boards, ("--prompt", prompt)),
        ("--model_name", boards, ("--model_name", "b")),
        ("--temperature", boards, ("--temperature", 1)), ("--seed", boards, ("--seed", 1)),
    ):  # fmt: skip
        code, told, error = ask(file, *arguments)
        assert (code, told) == (2, "")
        assert re.fullmatch(rf"error: --out \S+: was begun with another {what}; [^\n]+\n", error)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert len(fake.seen) == 2
    # A broken journal is said, not guessed at.
    with (tmp_path / "out/replies.jsonl").open("ab") as file:
        file.write(b"{}\n")
    assert "replies.jsonl, line 4: no reply" in ask(boards)[2]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/data.jsonl").write_text("x")
    assert "holds a data.jsonl that is not of this command" in ask(boards, "--out", tmp_path / "foreign")[2]


# ------------------------------------------------------------------------------------------ what is refused early


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_output": None}, "line 2, image_output: no helper image"),
        ({"text_output": "A"}, r"line 2, text_output: no answer in \boxed{…}"),
        ({"task": "vsp-nothing"}, "line 2, task: unknown task 'vsp-nothing'"),
        ({"task": "os:system"}, "line 2, task: 'os:system' is code"),
        ({"task": 3}, "line 2, task: expected a name"),
        ({"task": PLANNING}, "line 2, map_desc: missing"),
        ({"task": PLANNING, "map_desc": [[1, -1], [0, 2]], "text_output": "\\boxed{R}"}, "is wrong by the scorer of"),
        ({"image_output": "none.png"}, "line 2, image_output: no image 'none.png'"),
        ({"image_output": "rows.jsonl"}, "line 2, image_output: image"),
    ],
)
def test_faulty_rows(ask: Call, fake: Fake, plain: Path, tmp_path: Path, change: Row, sentence: str) -> None:
    first = lines(plain)[0]
    file = write(plain, first, {key: value for key, value in (first | change).items() if value is not None})
    code, told, error = ask(file)
    assert (code, told) == (2, "")
    assert sentence in error
    assert not fake.seen
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["{question}", "{answer}", "<image>", "<helper>"])
def test_templates(ask: Call, fake: Fake, plain: Path, tmp_path: Path, place: str) -> None:
    prompt, text = tmp_path / "p.txt", "{question} {answer} <image> <helper>"
    prompt.write_text(text.replace(place, ""))
    assert f"--prompt {prompt}: {place} is missing" in ask(plain, "--prompt", prompt)[2]
    prompt.write_text(text + place)
    assert f"{place} stands there 2 times" in ask(plain, "--prompt", prompt)[2]
    assert not fake.seen


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--endpoint URL with --model_name, or --model FOLDER"),
        (("--endpoint", "http://h/v1", "--model", "m"), "one of them"),
        (("--endpoint", "http://h/v1"), "--endpoint needs --model_name"),
        (("--model", "m", "--model_name", "x"), "--model_name goes with --endpoint"),
        (("--model", "nowhere"), "--model nowhere: no such folder"),
        (("--endpoint", "h:8000", "--model_name", "x"), "--endpoint is 'h:8000': "),
        (("--endpoint", "http://me:pass9@h/v1", "--model_name", "x"), "give the key by --key_variable"),
        (("--endpoint", "http://h", "--model_name", "x", "--key_variable", "NO_KEY"), "--key_variable NO_KEY: this"),
        (("--endpoint", "http://h", "--model_name", "x", "--temperature", 0), "-n 3 at --temperature 0"),
        (("--endpoint", "http://h", "--model_name", "x", "-n", 2, "--samples", 3), "say two things"),
    ],
)
def test_flags(call: Call, plain: Path, tmp_path: Path, arguments: tuple[object, ...], sentence: str) -> None:
    code, told, error = call(plain, "--out", tmp_path / "o", *arguments)
    assert (code, told) == (2, "")
    assert sentence in error
    assert "pass9" not in error
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------------- a model of one's own


def test_local_model(call: Call, boards: Path, nano: Path, tmp_path: Path) -> None:
    """A random model writes garbage: all is dropped and counted, and the same command writes nothing anew."""
    own = (boards, "--out", tmp_path / "o", "--model", nano, "-n", 2, "--most", 3, "--max_new_tokens", 8)
    own = (*own, "--batch_size", 2)
    code, told, error = call(*own)
    assert code == 2
    assert "none of 6 replies was accepted" in error
    assert re.search(r"replies +│ +6", told)
    assert sum(summary(tmp_path / "o")["counts"].values()) == 6
    noted = lines_there(tmp_path / "o")
    texts = {(row["row"], row["sample"]): row["text"] for row in map(json.loads, noted[1:])}
    assert len(set(texts.values())) == 6
    assert all(row["asked"] > 100 and 0 < row["written"] <= 8 for row in map(json.loads, noted[1:]))
    # Cut off within a batch it writes what it would have written.
    (tmp_path / "o/replies.jsonl").write_bytes(b"\n".join(noted[:4]) + b"\n" + noted[4][:20])
    assert call(*own)[0] == 2
    assert sorted(lines_there(tmp_path / "o")) == sorted(noted)
    assert call(*own, "--batch_size", 3)[2].count("another --batch_size") == 1
    # The decoder of before named itself nowhere, and drew other texts.
    first = json.loads(noted[0])
    first["setup"].pop("decoder", None)
    (tmp_path / "o/replies.jsonl").write_bytes(b"\n".join([json.dumps(first).encode(), *noted[1:]]) + b"\n")
    assert call(*own)[2].count("another decoder; name another folder") == 1
    # Other seeds draw other texts.
    assert call(*own, "--out", tmp_path / "p", "--seed", 1)[0] == 2
    assert lines_there(tmp_path / "p")[1:] != noted[1:]


def test_a_local_model_whose_logits_are_not_finite(call: Call, boards: Path, nano: Path, tmp_path: Path) -> None:
    """One sentence as in `evaluate`, and no reply is noted: `generate` alone would write "!!!!"."""
    shutil.copytree(nano, tmp_path / "broken")
    (file,) = (tmp_path / "broken").glob("*.safetensors")
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith("embed_tokens.weight"))].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    own = ("--out", tmp_path / "o", "--model", tmp_path / "broken", "-n", 1, "--max_new_tokens", 4)
    code, told, error = call(boards, *own)
    assert (code, told) == (2, "")
    assert error.startswith(f"error: {boards}, line 1: the logits of record 1 are not finite: ")
    assert len(lines_there(tmp_path / "o")) == 1
    assert not (tmp_path / "o/data.jsonl").exists()


def test_local_batches_are_what_single_rows_are(plain: Path, nano: Path, tmp_path: Path) -> None:
    """Greedy, rows of different lengths and pictures: as one at a time without a cache, by transformers alone."""
    import torch
    from transformers import AutoModelForImageTextToText

    from mirage_ds.curate.rationalize.local import Local

    spec = RationalizeSpec(out=tmp_path, model=str(nano), temperature=0, samples=1, max_new_tokens=6)
    local = Local(questions := Questions.read(plain, spec))
    model = AutoModelForImageTextToText.from_pretrained(nano, dtype=torch.float32).eval()
    encoder = local.decoder.encoder
    found = [reply.text for _, reply in local.replies([(row, 0) for row in range(3)])]
    assert len(set(found)) == len(questions.judges)
    for row, (judge, text) in enumerate(zip(questions.judges, found, strict=True)):
        sample = local.request(row)
        assert len(sample.image_grid_thw) == len(judge.record.image_input) + len(judge.record.image_output)
        ids = sample.input_ids[None]
        asked = encoder.tokenizer.decode(ids[0])
        assert f"The right answer: {judge.boxed}" in asked
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
        new: list[int] = []
        for _ in range(6):
            now = torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)
            types = (now == encoder.id_of("<|image_pad|>")).int()
            model.model.rope_deltas = None
            with torch.no_grad():
                logits = model(
                    input_ids=now, attention_mask=torch.ones_like(now), mm_token_type_ids=types, use_cache=False,
                    pixel_values=sample.pixel_values, image_grid_thw=sample.image_grid_thw,
                ).logits[0, -1]  # fmt: skip
            logits[[encoder.id_of(token) for token in NO_TEXT]] = -torch.inf
            new.append(int(logits.argmax()))
            if new[-1] in (encoder.id_of("<|im_end|>"), encoder.id_of("<|endoftext|>")):
                break
        assert text == encoder.tokenizer.decode(new, skip_special_tokens=True).strip()
    # A folder that was trained on latents would write their marks first: they are likelier now than what was written.
    weight = local.decoder.loaded.model.head.weight
    with torch.no_grad():
        weight[[encoder.id_of(token) for token in NO_TEXT]] = 3 * weight[new[0]]
    assert [reply.text for _, reply in local.replies([(row, 0) for row in range(3)])] == found
