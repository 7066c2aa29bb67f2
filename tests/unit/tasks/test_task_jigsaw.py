"""Jigsaw puzzles held against the photographs they were cut from, with plain numpy; BLINK's own rows."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from mirage_ds.cli import cli
from mirage_ds.config.flags import build_model
from mirage_ds.data.record_files import scan
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import Prediction, score
from mirage_ds.tasks.build import build, convert
from mirage_ds.tasks.draft import BuildReport
from mirage_ds.tasks.jigsaw import CORNERS, BlinkSettings, JigsawSettings

TASK = "blink-jigsaw"
SMALL = {"side": 84, "min_side": 56}


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A coarse picture whose parts differ."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty photographs of different kinds in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number in range(60):
        size = [(96, 72), (60, 80), (84, 84), (301, 203)][number % 4]
        photo(number, size).save(folder / ("more" if number % 2 else "") / f"p{number}.png")
    return folder


def run(folder: Path, out: Path, **values: Any) -> tuple[BuildReport, list[dict[str, Any]]]:
    report = build(TASK, build_model(JigsawSettings, SMALL | {"photos": folder, "out": out, **values}))
    return report, lines(out / f"{values.get('name', 'data')}.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def split_by_hand(path: Path) -> str:
    share = int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:4], "big") % 10
    return {8: "dev", 9: "test"}.get(share, "train")


@pytest.mark.parametrize("spelt", ["upper-left", "upper_left", "any"])
def test_the_command_takes_every_corner(photos: Path, tmp_path: Path, spelt: str) -> None:
    command = [
        "data",
        "build",
        "blink-jigsaw",
        "--photos",
        str(photos),
        "--out",
        str(tmp_path / "o"),
        "--corner",
        spelt,
    ]
    found = CliRunner().invoke(
        cli, [*command, "--count", "3", "--side", "84", "--min_side", "56"], catch_exceptions=False
    )
    assert found.exit_code == 0, found.output
    corners = {row["corner"] for row in lines(tmp_path / "o" / "data.jsonl")}
    assert corners <= set(CORNERS) if spelt == "any" else corners == {"upper-left"}


@pytest.mark.parametrize(("corner", "cut"), [("lower-right", 0.5), ("any", 0.5), ("any", 0.3)])
def test_a_puzzle_is_what_it_says(photos: Path, tmp_path: Path, corner: str, cut: float) -> None:
    report, rows = run(photos, tmp_path / "o", corner=corner, cut=cut)
    mine = {path for path in photos.rglob("*.png") if split_by_hand(path) == "train"}
    by_photo = {hashlib.sha256(path.read_bytes()).hexdigest()[:16]: path for path in mine}
    assert {row["photo"] for row in rows} == set(by_photo)
    assert report.records == len(rows) == len(by_photo)
    assert report.excluded == 60 - len(rows)
    corners = {row["corner"] for row in rows}
    assert corners == ({corner} if corner != "any" else {"upper-left", "upper-right", "lower-left", "lower-right"})
    away = set()
    for row in rows:
        gap, one, other = (pixels(tmp_path / "o" / path) for path in row["image_input"])
        whole = pixels(tmp_path / "o" / row["image_output"])
        with Image.open(by_photo[row["photo"]]) as image:
            image.thumbnail((84, 84), Image.Resampling.LANCZOS)
            shrunk = np.array(image.convert("RGB")).astype(int)
        assert np.array_equal(whole, shrunk)
        height, width = shrunk.shape[:2]
        h, w = int(height * cut), int(width * cut)
        assert one.shape == other.shape == (h, w, 3)
        top = height - h if row["corner"].startswith("lower") else 0
        left = width - w if row["corner"].endswith("right") else 0
        # Outside the gap the photograph, inside black.
        expected = shrunk.copy()
        expected[top : top + h, left : left + w] = 0
        assert np.array_equal(gap, expected)
        letter = row["text_output"].removeprefix("\\boxed{").removesuffix("}")
        right, wrong = (one, other) if letter == "A" else (other, one)
        assert np.array_equal(right, shrunk[top : top + h, left : left + w])
        assert abs(right - wrong).mean() >= 4
        # The wrong patch stands in the photograph at a place that does not meet the gap.
        places = [
            (y, x)
            for y in range(height - h + 1)
            for x in range(width - w + 1)
            if np.array_equal(shrunk[y, x], wrong[0, 0]) and np.array_equal(shrunk[y : y + h, x : x + w], wrong)
        ]
        free = [(y, x) for y, x in places if y + h <= top or y >= top + h or x + w <= left or x >= left + w]
        assert free
        away |= {(y - top, x - left) for y, x in free}
        assert row["corner"].replace("-", " ") in row["text_input"]
        assert row["text_input"].startswith("<image><image><image>\n")
        assert row["split"] == "train"
    assert len(away) > 15
    letters = Counter(row["text_output"] for row in rows)
    assert set(letters) == {"\\boxed{A}", "\\boxed{B}"}
    assert abs(letters["\\boxed{A}"] - letters["\\boxed{B}"]) <= 1
    assert report.classes == {"A": letters["\\boxed{A}"], "B": letters["\\boxed{B}"]}
    assert [row["text_output"] for row in rows] != [rows[i % 2]["text_output"] for i in range(len(rows))]


def test_a_photograph_lies_in_one_split_whatever_it_is_called(photos: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        shutil.copy(path, mixed / f"{59 - number:02}.png")
        shutil.copy(path, mixed / f"again{number}.png")
    seen = {}
    for split in ("train", "dev", "test"):
        one, first = run(photos, tmp_path / split, split=split, seed=1)
        two, second = run(mixed, tmp_path / f"{split}2", split=split, seed=2)
        seen[split] = {row["photo"] for row in first}
        assert seen[split] == {row["photo"] for row in second}
        assert (one.duplicates, two.duplicates) == (0, len(seen[split]))
        assert len(seen[split]) == sum(split_by_hand(path) == split for path in photos.rglob("*.png"))
    assert sum(len(found) for found in seen.values()) == len(set.union(*seen.values())) == 60
    assert min(len(found) for found in seen.values()) >= 2


def test_the_same_seed_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    def content(name: str, seed: int) -> dict[str, bytes]:
        run(photos, tmp_path / name, count=20, seed=seed, corner="any")
        return {
            str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()
        }

    first = content("a", 7)
    assert len(first) > 60
    assert content("b", 7) == first
    assert content("c", 8) != first


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    made = 0
    for number in range(40):
        photo(number, (80, 60)).save(folder / f"good{number}.png")
        made += split_by_hand(folder / f"good{number}.png") == "train"
    lost = Counter[str]()
    for number in range(10):
        small, wide, plain = (folder / f"{what}{number}.png" for what in ("small", "wide", "plain"))
        photo(number, (200, 55)).save(small)  # as it is too small
        photo(number, (400, 100)).save(wide)  # too small once it is shrunk to 84 × 21
        Image.new("RGB", (80, 60), (number, 90, 200)).save(plain)
        (folder / f"bad{number}.jpg").write_bytes(b"\xff\xd8no photograph" + bytes([number]))
        lost["too small"] += (split_by_hand(small) == "train") + (split_by_hand(wide) == "train")
        lost["alike all over"] += split_by_hand(plain) == "train"
        lost["unreadable"] += split_by_hand(folder / f"bad{number}.jpg") == "train"
    (folder / "notes.txt").write_text("no photograph")
    report, rows = run(folder, tmp_path / "o")
    assert len(rows) == made
    assert {what.removeprefix("photographs left out, "): count for what, count in report.notes.items()} == lost
    assert min(lost.values()) > 0
    # Nothing is enlarged.
    assert {Image.open(tmp_path / "o" / row["image_output"]).size for row in rows} == {(80, 60)}
    with pytest.raises(
        UserError, match=rf"only {made} of its 80 photographs can be used in split train, not the 99 ask"
    ):
        run(folder, tmp_path / "p", count=99)
    assert not (tmp_path / "p").exists()
    assert run(folder, tmp_path / "p", count=5)[0].records == 5


def test_a_photograph_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Not --out, which is opened before it."""
    (tmp_path / "photos").mkdir()
    file = tmp_path / "photos/a.png"
    file.symlink_to("/proc/self/mem")  # an I/O error for root too
    with pytest.raises(UserError) as error:
        run(tmp_path / "photos", tmp_path / "o")
    assert str(error.value) == f"{file}: cannot be read (Input/output error); make it readable"


def test_an_upright_photograph_is_cut_upright(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    for number in range(8):
        photo(number, (80, 60)).save(tmp_path / f"photos/p{number}.png", exif=exif)
    _, rows = run(tmp_path / "photos", tmp_path / "o")
    assert {Image.open(tmp_path / "o" / row["image_output"]).size for row in rows} == {(60, 80)}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"photos": "nowhere"}, "--photos nowhere: no such folder"),
        ({"min_side": 900}, "has made no record; what was left out: photographs left out, too small"),
        ({"cut": 0.7}, "--cut is 0.7: Input should be less than or equal to 0.5"),
        ({"corner": "middle"}, "--corner is 'middle'"),
        ({"count": 0}, "--count is 0"),
    ],
)
def test_bad_settings(photos: Path, tmp_path: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        run(photos, tmp_path / "o", **values)
    assert says in str(error.value)


# ------------------------------------------------------------------------------------------------------------ BLINK


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def blink(folder: Path, split: str, answers: list[str]) -> Path:
    rows = [
        {
            "idx": f"{split}_Jigsaw_{n}",
            "question": f"Which image is the missing part? ({n})",
            "prompt": "…",
            "choices": ["the second image", "the third image"],
            "answer": answer,
            **{f"image_{i}": {"bytes": png(photo(10 * n + i)), "path": f"{n}_{i}.jpg"} for i in (1, 2, 3)},
            "image_4": None,
        }
        for n, answer in enumerate(answers)
    ]
    path = folder / "Jigsaw" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def turn(source: Path, out: Path, **values: Any) -> tuple[BuildReport, list[dict[str, Any]]]:
    report = convert(TASK, source, build_model(BlinkSettings, {"out": out, **values}))
    return report, lines(out / "data.jsonl")


def test_blinks_rows_become_records_to_evaluate_on(tmp_path: Path) -> None:
    hub = tmp_path / "BLINK"
    blink(hub, "val", ["(A)", "(B)", "(B)"])
    blink(hub, "test", ["hidden", "hidden"])
    (hub / "Counting").mkdir()
    (hub / "Counting/val-00000-of-00001.parquet").write_bytes(b"another data set")
    report, rows = turn(hub, tmp_path / "val", split="val")
    assert (report.records, report.classes, report.notes) == (3, {"A": 1, "B": 2}, {})
    assert [row["text_output"] for row in rows] == ["\\boxed{A}", "\\boxed{B}", "\\boxed{B}"]
    for n, row in enumerate(rows):
        assert row["idx"] == f"val_Jigsaw_{n}"
        assert row["text_input"].startswith(
            f"<image><image><image>\nWhich image is the missing part? ({n})\n(A) the sec"
        )
        assert "image_output" not in row
        for i, path in enumerate(row["image_input"], 1):
            assert np.array_equal(pixels(tmp_path / "val" / path), np.array(photo(10 * n + i)))
    records = scan(tmp_path / "val/data.jsonl")[0]
    answers = [Prediction(text, [], []) for text in ("\\boxed{A}", "\\boxed{The second image.}", "B")]
    found = score(records, answers, TASK)["all"]
    assert (found["correct"], found["invalid"]) == (1 / 3, 1 / 3)
    report, rows = turn(hub, tmp_path / "test", split="test")
    assert report.notes == {"answers withheld": 2}
    records = scan(tmp_path / "test/data.jsonl", answers=False)[0]
    with pytest.raises(UserError, match="record on line 1 has no 'text_output', which blink-jigsaw is scored by"):
        score(records, [Prediction("\\boxed{A}", [], [])] * 2, TASK)


def test_which_files_are_meant(tmp_path: Path) -> None:
    hub = tmp_path / "BLINK"
    file = blink(hub, "val", ["(A)"])
    assert turn(file, tmp_path / "one")[0].records == 1
    assert turn(hub, tmp_path / "only")[0].records == 1
    blink(hub, "test", ["hidden"])
    with pytest.raises(UserError, match="has the splits test, val; say which one with --split"):
        turn(hub, tmp_path / "o")
    with pytest.raises(UserError, match="has no split 'train'; there are test, val"):
        turn(hub, tmp_path / "o", split="train")
    with pytest.raises(UserError, match="no such file or folder"):
        turn(tmp_path / "nowhere", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no Parquet or Arrow file, nor one in it"):
        turn(tmp_path / "empty", tmp_path / "o")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=r"val-00000-of-00001\.parquet: cannot be read as Parquet \(.*\); write it anew"
    ):
        turn(file, tmp_path / "o")
    pq.write_table(pa.table({"idx": ["a"], "question": ["?"]}), file)
    with pytest.raises(UserError, match="has no column choices and answer and image_1, only idx, question; name the"):
        turn(file, tmp_path / "o")


def test_bad_rows_end_it_or_are_left_out(tmp_path: Path) -> None:
    file = blink(tmp_path / "BLINK", "val", ["(A)", "(B)", "(E)", "(B)", "(A)"])
    rows = pq.read_table(file).to_pylist()
    rows[1]["image_2"]["bytes"] = rows[1]["image_2"]["bytes"][:200]
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(
        UserError, match=r"parquet, row 2: image_2 cannot be decoded \(.*\); fix it, or leave such rows"
    ):
        turn(file, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    report, made = turn(file, tmp_path / "o", skip_bad_records=True)
    assert [row["idx"][-1] for row in made] == ["0", "3", "4"]
    assert report.notes["bad rows left out"] == 2


def test_the_help_spells_choices_as_the_default() -> None:
    said = " ".join(CliRunner().invoke(cli, ["data", "build", "blink-jigsaw", "--help"]).output.split())
    assert "--corner [any|upper-left|upper-right|lower-left|lower-right]" in said
    assert "[default: lower-right]" in said
