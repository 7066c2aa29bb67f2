"""`mirage-ds curves`: what is read from logs, what is drawn of it, and the files that come out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.colors import to_hex
from PIL import Image

from mirage_ds.analysis.inspect.style import COLOURS
from mirage_ds.cluster.status import curves as drawing
from mirage_ds.cluster.status.command import curves
from mirage_ds.errors import UserError


def log(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    (folder / "run").mkdir(parents=True)
    (folder / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "loss": float(number), "seconds": 2.0, "rows": 8, "tokens": 100 * number} | values


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """Steps 1 to 4, then 3 to 5 again from a checkpoint; a loss that was not finite; an evaluation; half a line."""
    lines = [step(1), step(2, loss=None), step(3), step(4), {"step": 4, "time": 1.0, "eval_loss": 9.0}]
    lines += [step(3, loss=30.0), step(4, loss=40.0), {"step": 4, "time": 2.0, "eval_loss": 4.5}, step(5)]
    return log(tmp_path / "runs/resumed/sft", lines, '{"step": 6, "lo')


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return log(tmp_path / "runs/other/sft", [step(number, ce=1.0) for number in range(1, 9)])


def said(*arguments: object) -> tuple[int, str]:
    got = CliRunner().invoke(curves, [str(one) for one in arguments], standalone_mode=False)
    if isinstance(got.exception, UserError):
        return 2, str(got.exception)
    assert got.exception is None, got.exception
    return 0, got.output


@pytest.mark.parametrize(
    ("against", "x", "evaluated"),
    [
        ("step", [1, 2, 3, 4, 5], 4),
        ("rows", [8, 16, 24, 32, 40], 32),
        ("tokens", [100, 300, 600, 1000, 1500], 1000),
        ("seconds", [2, 4, 6, 8, 10], 8),
    ],
)
def test_parts_of_a_resumed_run_are_joined(resumed: Path, against: str, x: list[float], evaluated: float) -> None:
    found = drawing.read_curves(resumed, against)
    assert found["loss"].x.tolist() == x
    np.testing.assert_array_equal(found["loss"].y, [1, math.nan, 30, 40, 5])
    assert (found["eval_loss"].x.tolist(), found["eval_loss"].y.tolist()) == ([evaluated], [4.5])


@pytest.mark.parametrize("width", [1, 2, 3, 7, 100])
def test_the_mean_is_that_of_the_last_steps_with_a_number(width: int) -> None:
    values = np.random.default_rng(0).normal(size=40)
    values[[0, 5, 6, 7, 39]] = math.nan
    slow = []
    for end in range(1, 41):
        known = [value for value in values[max(0, end - width) : end] if not math.isnan(value)]
        slow.append(sum(known) / len(known) if known else math.nan)
    np.testing.assert_allclose(drawing.moving_mean(values, width), slow, atol=1e-12)


def test_each_run_has_its_colour_and_its_points_behind_the_mean(
    resumed: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def keep(figure: Any) -> bytes:
        made.append(figure)
        return b"png"

    monkeypatch.setattr(drawing, "png", keep)
    assert said(resumed, other, "--out", tmp_path / "x.png", "--smooth", 2)[0] == 0
    loss, evaluation = made[0].axes
    points, mean, *second = loss.lines
    assert points.get_alpha() < 0.5
    assert points.get_zorder() < mean.get_zorder()
    np.testing.assert_array_equal(mean.get_ydata(), [1, 1, 30, 35, 22.5])
    assert [to_hex(line.get_color()).upper() for line in (points, mean, *second)] == [
        *[COLOURS[0]] * 2, *[COLOURS[1]] * 2,
    ]  # fmt: skip
    assert evaluation.lines[0].get_ydata().tolist() == [4.5]
    assert [text.get_text() for text in made[0].legends[0].get_texts()] == ["resumed", "other"]
    assert (loss.get_title(), loss.get_xlabel()) == ("training loss, mean over 2 steps", "optimizer step")
    assert evaluation.get_title() == "evaluation: loss"


def test_png_and_svg_are_pictures_with_the_names_in_them(resumed: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/x.png"
    assert said(resumed, other, "--out", out) == (0, f"{out}: loss, eval_loss of 2 run(s)\n")
    with Image.open(out) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
    out = tmp_path / "x.svg"
    for _ in range(2):
        assert said(resumed, other, "--out", out, "--metric", "ce,loss", "--against", "tokens")[0] == 0
        first = out.read_bytes()
    assert said(resumed, other, "--out", out, "--metric", "ce,loss", "--against", "tokens")[0] == 0
    assert out.read_bytes() == first
    ElementTree.fromstring(first)


def test_what_cannot_be_drawn_is_one_sentence(resumed: Path, tmp_path: Path) -> None:
    begun = log(tmp_path / "begun", [])
    assert said(begun, "--out", tmp_path / "x.png") == (2, f"{begun}: no step has been logged yet; try later")
    code, text = said(resumed, "--out", tmp_path / "x.png", "--metric", "loss,los")
    assert (code, text) == (
        2, "--metric los: in no log of these runs; there are eval_loss, loss, rows, seconds, tokens",
    )  # fmt: skip
    assert said(resumed, "--out", tmp_path / "x.pdf") == (
        2, f"--out {tmp_path / 'x.pdf'}: write a name that ends in .png or .svg",
    )  # fmt: skip
    assert not list(tmp_path.glob("x.*"))
