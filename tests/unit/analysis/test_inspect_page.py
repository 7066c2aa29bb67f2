"""`mirage-ds inspect` from a folder to a page, what it refuses, and that no label is cut off or lies on another."""

from __future__ import annotations

import html
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from support.alike import slowly

from mirage_ds.analysis.alike import LABELS, sentence
from mirage_ds.analysis.bench import Bench
from mirage_ds.analysis.inspect import draw
from mirage_ds.analysis.inspect.look import Look, drawings, taught
from mirage_ds.analysis.inspect.measure import Projection, Words, project
from mirage_ds.analysis.inspect.probe import Reading, read
from mirage_ds.analysis.inspect.study import questions_for
from mirage_ds.analysis.inspect.style import styled
from mirage_ds.cli import cli
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.decoder import load_decoder
from mirage_ds.tasks.maps import parse_board
from mirage_ds.tasks.render import render

MAPS = 52


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of different 4 × 4 maps without pictures of them: the probe needs maps, not sight."""
    folder = tmp_path_factory.mktemp("boards")
    for name in ("in", "out"):
        Image.effect_noise((56, 84), 60).convert("RGB").save(folder / f"{name}.png")
    rows = []
    for number in range(MAPS):
        holes = [-1 if number >> bit & 1 else 0 for bit in range(6)]
        board = [[1, *holes[:3]], [0, *holes[3:]], [0, 0, 0, 0], [0, 0, 0, 2]]
        rows.append(
            {
                "text_input": "<image>Fewest moves to the goal?",
                "text_output": "\\boxed{DOWN, RIGHT}",
                "image_input": "in.png",
                "image_output": "out.png",
                "map_desc": board,
                "path": ["DOWN", "RIGHT"],
            }
        )
    rows.append({"text_input": "Where?", "text_output": "Up."})
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def call(*words: object) -> str:
    found = CliRunner().invoke(cli, ["inspect", *map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output.strip()


class Tags(HTMLParser):
    """Collects attributes that could load something, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.sources += [values[name] for name in ("src", "href", "srcset") if name in values]
        if tag == "img":
            self.alts.append(values["alt"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_page_that_needs_nothing_beside_it(nano: Path, boards: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen"
    arguments = ("--rows", "3,3", "--decode", "--max_new_tokens", 3, "--latent_size", 2, "--out", out)
    page, words = call(nano, "--data_path", boards, *arguments).split("\n", 1)
    assert page == str(out / "index.html")
    text = (out / "index.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.sources
    # The picture leads.
    assert text.index("<h2>row 3") < text.index("<img") < text.index("<dl>") < text.index("How it was made")
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert all(tags.alts)
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    # A nano that was never trained opens none.
    assert text.count("The model opened no latent block.") == 1
    kinds = ("similarity", "words", "norms", "attention")
    rows = {f"row_3_line_4_answer_given_{kind}.png" for kind in kinds}
    assert {path.name for path in out.iterdir()} == rows | {"pca.png", "probe_4_4.png", "numbers.json", "index.html"}
    numbers = json.loads((out / "numbers.json").read_text())
    assert list(numbers["rows"]) == ["row 3 (line 4), answer given"]
    assert len(numbers["rows"]["row 3 (line 4), answer given"]["norms"]) == 2
    found = numbers["probe"]["4 × 4"]
    assert list(found) == ["move 1", "move 2", "cells"]
    # Everybody goes down first, and whoever always says so is right.
    assert all(reading["accuracy"] == reading["chance"] == 1 for reading in found["move 1"].values())
    # Nothing can be more often right than what is always right, and a nano that was never trained knows no map.
    assert ". A linear probe finds move 1 (4 × 4) in 100.0 % (95 % interval 93.1 to 100.0, the commonest" in words
    assert words.endswith("; whether the answer uses the latents, only `mirage-ds controls` tells.")
    assert numbers["words"] == words
    assert words.replace("'", "&#39;") in text
    assert set(found["cells"]) == {"all latents", "latent 1", "latent 2", "helper targets", "input image, pooled"}
    assert numbers["path"] is None
    # One picture for all: its rows are the same but for rounding, which the page says first.
    assert words.startswith("Latents of different rows are nearly alike (mean cosine 1.00): little of them depends on")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of eight empty boards with two shortest paths, each a picture of its own; the last has one path."""
    folder = tmp_path_factory.mktemp("forks")
    rows = []
    for number in range(8):
        board = [[1, 0, 0], [0, 2, 0], [-1 if bit == "1" else 0 for bit in f"{number:03b}"]]
        if number == 7:
            board[0][1] = -1
        picture = render(parse_board(board, "here"), cell_size=28)
        picture.save(folder / f"in{number}.png")
        picture.rotate(90).save(folder / f"out{number}.png")
        rows.append(
            {"text_input": "<image>Where to?", "text_output": "\\boxed{D,R}", "image_input": f"in{number}.png"}
            | {"image_output": f"out{number}.png", "map_desc": board, "task": "vsp-spatial-planning"}
        )
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_page_says_how_alike_latents_are_and_which_path_answers_follow(
    nano: Path, forks: Path, tmp_path: Path
) -> None:
    out, k = tmp_path / "seen", 3
    arguments = ("--decode", "--max_new_tokens", 6, "--latent_size", k, "--batch_size", 3, "--out", out)
    _, words = call(nano, "--data_path", forks, *arguments).split("\n", 1)
    numbers, text = json.loads((out / "numbers.json").read_text()), html.unescape((out / "index.html").read_text())
    decoder = load_decoder(nano, ImageFinder.beside(forks, None))
    encoder = decoder.latent_encoder("stage2", k)
    samples = [encoder.encode(record, row) for row, record in enumerate(scan(forks)[0])]
    bench = Bench(decoder.loaded.model, decoder.tower, encoder)
    # One row at a time.
    wanted = slowly(torch.stack([taught(bench, [sample])[0].latents[0] for sample in samples]))
    assert numbers["latents"] == pytest.approx(wanted, abs=1e-4)
    assert wanted["cosine_between"] < 0.9999
    said = sentence(numbers["latents"])
    assert words == numbers["words"]
    assert words.startswith(f"{said} Nothing was tested")
    section = text[text.index("<h2>How alike the latents are</h2>") : text.index("<h2>Where the latents lie</h2>")]
    assert said in section
    for name, value in numbers["latents"].items():
        assert f"<dt>{LABELS[name]}</dt><dd><pre>{value:.3f}</pre></dd>" in section
    followed = numbers["path"]
    assert (followed["records"], followed["left_out"]) == (7, 1)
    assert "<h2>Which path answers follow</h2>" in section
    assert "Latents of path A (the record's own) or B (another shortest one): the answer is the path" in section


def test_without_enough_maps_there_is_no_probe(boards: Path) -> None:
    records, finder = scan(boards)[0], ImageFinder.beside(boards, None)
    for few in (records[:5], [replace(record, extra={}) for record in records]):
        assert questions_for(few, (), finder) == []
    (asked,) = questions_for(records[:MAPS], (), finder)
    assert (asked.name, asked.unit) == ("4 × 4", "maps")
    assert list(read({"all latents": torch.randn(MAPS, 6)}, asked)["cells"]) == ["all latents"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rows", "53"), r"--rows 53: .*data.jsonl has the rows 0 to 52; choose among them"),
        (("--rows", "52"), r"--rows 52: the record on line 53 of .* has no latent block; choose a row with a helper"),
        (("--rows", "0"), r"config.json does not say how many latents .*; give --latent_size"),
        (("--label", "colour"), r"--label colour: no record has it; there are text_output, map_desc, path$"),
        (("--label", "maps"), r"--label maps: no record has it \(did you mean 'map_desc'\?\)"),
        (("--label", "path"), r"--label path: 1 value\(s\) in 52 records with 1 different pictures; a probe needs at"),
        (
            ("--label", "map_desc"),
            r"--label map_desc: 52 value\(s\) in 52 records .*at least two values, 5 records for each",
        ),
        (("--rows", "-1"), r"--rows is '-1': Input should be greater than or equal to 0"),
        (("--rows", "one"), r"--rows is 'one': Input should be a valid integer"),
    ],
)
def test_mistakes_are_told(nano: Path, boards: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(nano, "--data_path", boards, "--out", tmp_path / "none", *words)
    assert not list(tmp_path.iterdir())


def test_a_helper_that_is_gone_leaves_nothing_behind(nano: Path, boards: Path, tmp_path: Path) -> None:
    shutil.copytree(boards.parent, tmp_path / "data")
    (tmp_path / "data" / "out.png").unlink()
    arguments = ("--latent_size", 2, "--out", tmp_path / "none")
    with pytest.raises(UserError, match=r"data\.jsonl: record on line 1, image_output"):
        call(nano, "--data_path", tmp_path / "data" / "data.jsonl", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_is_there_is_not_written_over(nano: Path, boards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--out {tmp_path} exists; remove it, or choose another"):
        call(nano, "--data_path", boards, "--latent_size", 2, "--out", tmp_path)


def fabricated(k: int, layers: int, answer: int, images: int = 1) -> Look:
    """A look of any size, with words that are hard to write."""
    torch.manual_seed(0)
    ids = torch.arange(3 * k).view(k, 3)
    hard = ["$\\frac$", "␣a_long_word_that_goes_on", "漢字", "\\n", "<|latent_start|>", "^{_"]
    share = torch.rand(layers, 4).softmax(-1)
    found: Any = SimpleNamespace(
        title="row 12345 (line 12346), run 2, answer given",
        similarity=[
            (f"input image {i}", np.full((60, 90, 3), 200, np.uint8), torch.rand(k, 2, 3)) for i in range(images)
        ],
        nearest=Words(ids, torch.rand(k, 3).sort(descending=True).values),
        lens=Words(ids, torch.rand(k, 3).sort(descending=True).values),
        spellings={token: hard[token % 6] for token in range(3 * k)},
        norms=100 + torch.rand(k),
        word_norms=torch.rand(500),
        feature_norms=50 * torch.rand(6),
        to_targets=torch.rand(k, k),
        attention=torch.rand(layers, answer, k) / 10,
        shares=share / share.sum(-1, keepdim=True),
        uniform=0.05,
        answer=[hard[token % 6] for token in range(answer)],
    )
    return found


def assert_legible(figure: Figure) -> None:
    """No text leaves the figure, no two titles meet, and no two names beside an axis."""
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01
    shown = [axes for axes in figure.axes if axes.get_visible()]
    apart([axes.title for axes in shown])
    for axes in shown:
        apart([label for label in axes.get_yticklabels() if axes.axison])


def apart(texts: Sequence[Text]) -> None:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for (one, box), (other, its) in itertools.combinations(boxes, 2):
        # Letters do not fill their line: two lines may share a pixel.
        overlap = min(box.x1, its.x1) - max(box.x0, its.x0), min(box.y1, its.y1) - max(box.y0, its.y0)
        assert min(overlap) <= 1, (one, other)


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("small", [False, True])
def test_labels_are_whole_whatever_the_sizes(small: bool) -> None:
    for figure in drawings(fabricated(k=8, layers=28, answer=60), small).values():
        assert_legible(figure)
    assert_legible(drawings(fabricated(k=1, layers=2, answer=2, images=2))["similarity"])


def test_what_is_not_there_is_not_drawn() -> None:
    look = fabricated(2, 2, 0)
    vars(look).update(similarity=[], to_targets=None, answer=[])
    made = drawings(look)
    assert set(made) == {"words", "norms"}
    assert "targets" not in made["norms"].get_suptitle()


def test_no_number_beside_an_axis_is_a_formula() -> None:
    figure = drawings(fabricated(2, 2, 3))["norms"]
    figure.draw_without_rendering()
    assert not [text for axes in figure.axes for text in axes.get_xticklabels() if "$" in text.get_text()]


def test_components_and_readings_are_legible() -> None:
    kinds = {"text embeddings": torch.randn(9, 5), "input image features": 9 + torch.randn(7, 5)}
    kinds |= {f"latent {number}": torch.randn(4, 5) for number in range(1, 9)}
    with styled():
        shown = draw.pca(project(kinds, False), project(kinds, True), "data.jsonl, 4 rows: latents among others")
    assert_legible(shown)
    reading = Reading(0.5, 0.4, 0.6, 0.25, 100, 90)
    for count in (2, 5):
        sources = {f"latent {number}": reading for number in range(1, 9)} | {"input image, pooled": reading}
        asked = {f"move {number}": sources for number in range(1, count + 1)}
        with styled():
            shown = draw.reads(asked, "data.jsonl, boards of 3 × 3: what is read", "maps")
        assert_legible(shown)


def test_unit_vectors_are_projected_by_direction_alone() -> None:
    kinds = {"text embeddings": torch.randn(9, 5), "latent 1": torch.randn(4, 5)}
    longer = {name: vectors * (1 + torch.rand(len(vectors), 1)) for name, vectors in kinds.items()}

    def points(found: Projection) -> torch.Tensor:
        return torch.cat(list(found.points.values()))

    torch.testing.assert_close(points(project(kinds, True)), points(project(longer, True)), rtol=0, atol=1e-5)
    assert not torch.allclose(points(project(kinds, False)), points(project(longer, False)), rtol=0, atol=1e-2)
