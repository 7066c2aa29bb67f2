"""`data show`: the page parses, the pictures in it are the record's, and each stands where its mark stands."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mirage_ds.cli import cli
from mirage_ds.curate.show import parse_rows, read_shown
from mirage_ds.errors import UserError

VOID = {"meta", "img", "br"}
COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    noise = np.random.default_rng(0).integers(0, 255, (487, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows: list[Any] = [
        {
            "text_input": "One <image>, two <image>?",
            "text_output": "So <output_image>then <output_image>it is \\boxed{A & <B>}.",
            "image_input": ["a.png", "b.png"],
            "image_output": ["c.png", "a.png"],
            "level": 3,
            "note": "<script>alert(1)</script>",
        },
        {"text_input": "Large?", "text_output": "\\boxed{A}", "image_input": "large.png", "image_output": "b.png"},
        {
            "text_input": "<image>?",
            "text_output": "\\boxed{A}",
            "image_input": "broken.png",
            "task": "vsp-spatial-reasoning",
        },
        {"text_input": "?", "text_output": "no box", "task": "vsp-spatial-reasoning"},
        {"text_input": "?", "text_output": "left<output_image>right"},
        {"text_input": "a question alone", "image_input": "c.png"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n\n" + json.dumps(rows[4]) + "\n")
    return path


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed, in order; text and pictures come in the order of the page."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, str, Any]] = []
        self.figure = ""
        self.tags: set[str] = set()
        self.article = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.article = str(values["id"])
        if tag == "figure":
            self.figure = values["class"] or "image"
        if tag == "img":
            kind, content = str(values["src"]).split(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg")
            with Image.open(io.BytesIO(base64.b64decode(content))) as image:
                assert image.size == (int(str(values["width"])), int(str(values["height"])))
                self.seen.append((self.article, self.figure, np.array(image.convert("RGB")).astype(int)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title") and data.strip():
            self.seen.append((self.article, self.open[-1], data.strip()))

    def of(self, line: int) -> list[tuple[str, Any]]:
        return [(kind, value) for article, kind, value in self.seen if article == f"line{line}"]


def call(*arguments: object) -> str:
    done = CliRunner().invoke(cli, ["data", "show", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_a_page_has_everything_in_it(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert call(file, "--out", out) == f"{out}: 8 records\n"
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "prefers-color-scheme: dark" in text
    # Text and pictures of the first record, in the order in which they are read.
    order = [
        (kind, next(name for name, colour in COLOURS.items() if np.abs(value - colour).max() < 6))
        if isinstance(value, np.ndarray)
        else (kind, value)
        for kind, value in page.of(1)
        if kind in ("div", "image", "latent")
    ]
    assert order == [
        ("div", "One"), ("image", "a"), ("div", ", two"), ("image", "b"), ("div", "?"),
        ("div", "So"), ("latent", "c"), ("div", "then"), ("latent", "a"), ("div", "it is \\boxed{A & <B>}."),
        ("div", "level: 3"), ("div", "note: <script>alert(1)</script>"),
    ]  # fmt: skip
    captions = [value for kind, value in page.of(1) if kind == "figcaption"]
    assert captions == ["image 1: a.png", "image 2: b.png", "latents 1: c.png", "latents 2: a.png"]
    # Without a mark pictures stand first, in the question as in the answer; large ones are shrunk.
    kinds = [kind for kind, _ in page.of(2) if kind in ("div", "image", "latent")]
    assert kinds == ["image", "div", "latent", "div"]
    large = next(value for kind, value in page.of(2) if kind == "image")
    assert large.shape == (445, 640, 3)
    assert len(text) < 1_500_000


def test_faults_are_said(file: Path) -> None:
    faults = {
        one.line: [f"{fault.field}: {fault.what}" for fault in one.faults] for one in read_shown(file, None, None)
    }
    assert faults[1] == faults[2] == faults[5] == faults[9] == []
    assert faults[3][0].startswith("image_input: image ")
    assert "cannot be decoded" in faults[3][0]
    assert faults[4] == ["text_output: vsp-spatial-reasoning reads no answer out of it"]
    assert faults[6] == ["text_output: missing"]
    assert faults[7][0].startswith("json: not valid JSON")
    page = call(file, "--rows", "4,6-7")
    assert page.count("FAULT") == 3
    assert "a question alone" in page
    assert "{broken" in page


def test_a_data_files_own_task_is_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text_input": "?", "text_output": "x", "task": "nowhere:Task"}))
    assert read_shown(path, None, None)[0].faults == []


def test_text_has_the_places(file: Path) -> None:
    said = call(file, "--rows", "1,5")
    assert "One [image 1: a.png], two [image 2: b.png]?" in said
    assert "So [latents 1: c.png]then [latents 2: a.png]it is \\boxed{A & <B>}." in said
    assert "left[latents 1: no picture]right" in said
    assert "line 2 " not in said


def test_a_sheet_shows_every_picture(file: Path, tmp_path: Path) -> None:
    call(file, "--rows", "1", "--out", tmp_path / "page.png")
    sheet = np.array(Image.open(tmp_path / "page.png"))
    assert sheet.shape[1] == 1200
    areas = {name: int((sheet == colour).all(-1).sum()) for name, colour in COLOURS.items()}
    assert areas == {"a": 2 * 60 * 40, "b": 60 * 40, "c": 60 * 40}


@pytest.mark.parametrize("kind", ["html", "png"])
def test_half_a_surrogate_pair_and_long_words_are_shown(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text_input": "half \ud800", "text_output": "x" * 2000}))
    call(path, "--out", tmp_path / f"page.{kind}")
    if kind == "html":
        assert "half \\ud800" in (tmp_path / "page.html").read_text(encoding="utf-8")
    else:
        # The long word fills line after line.
        assert Image.open(tmp_path / "page.png").height > 200


@pytest.mark.parametrize(("text", "lines"), [("3", {3}), ("1,5-8", {1, 5, 6, 7, 8}), (" 2 , 2-2", {2})])
def test_rows(text: str, lines: set[int]) -> None:
    assert parse_rows(text) == lines


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1,,2", "-3", "1-"])
def test_rows_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="write it like 1,5-8"):
        parse_rows(text)


def test_what_cannot_be_shown(file: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        with pytest.raises(UserError) as error:
            call(*arguments)
        return str(error.value)

    assert "rows.jsonl: there is no record on line 8; look for others with --rows" in refused(file, "--rows", "1,8")
    assert "no such file of records" in refused(tmp_path / "nowhere.jsonl")
    out = tmp_path / "page.html"
    out.write_text("mine")
    assert f"--out {out}: exists; remove it" in refused(file, "--out", out)
    assert out.read_text() == "mine"
    assert "is neither .html nor .png" in refused(file, "--out", tmp_path / "page.pdf")
    assert "cannot be written (Not a directory)" in refused(file, "--out", file / "page.html")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "there is no record;" in refused(tmp_path / "empty.jsonl")
