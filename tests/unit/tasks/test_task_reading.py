"""The tasks that only look: pictures held against plain pixels and Planning's files, scores against plain lists."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mirage_ds.cli import main
from mirage_ds.curate.check import check_file
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import Prediction, score
from mirage_ds.tasks import get_task
from mirage_ds.tasks.build import build

TRANSCRIPTION, READING, PLANNING = "vsp-transcription", "vsp-path-reading", "vsp-spatial-planning"
SPELLED = {1: "S", 0: "F", -1: "H", 2: "G"}
DELTA = {"LEFT": (0, -1), "DOWN": (1, 0), "RIGHT": (0, 1), "UP": (-1, 0)}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made(task: str, out: Path, **values: Any) -> list[dict[str, Any]]:
    settings = get_task(task).build_settings
    return lines(build(task, settings(out=out, **values)).file)


def scores(task: str, text: str, /, **extra: Any) -> dict[str, float]:
    found = score([Record(1, "?", "x", (), (), extra)], [Prediction(text, [], [])], task)["all"]
    return {name: value for name, value in found.items() if name not in ("count", "low", "high", "runs", "latents")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reading")
    made(TRANSCRIPTION, out / "seen", count=30, seed=3)
    made(READING, out / "read", count=30, seed=3, ties="random")
    return out


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def test_a_transcription_spells_what_the_picture_shows(folder: Path) -> None:
    rows = lines(folder / "seen/data.jsonl")
    assert len({str(row["map_desc"]) for row in rows}) == 30
    tiles: dict[str, np.ndarray] = {}
    for row in rows:
        assert row["text_output"].startswith("\\boxed{")
        spelled = row["text_output"][7:-1].split("/")
        assert spelled == ["".join(SPELLED[cell] for cell in line) for line in row["map_desc"]]
        assert (row["task"], row["level"], "image_output" in row) == (TRANSCRIPTION, len(spelled), False)
        image = pixels(folder / "seen" / row["image_input"])
        assert image.shape == (64 * len(spelled), 64 * len(spelled), 3)
        # Cells with one letter look alike, in this picture and in all the others.
        for r, line in enumerate(spelled):
            for c, letter in enumerate(line):
                tile = image[64 * r : 64 * r + 64, 64 * c : 64 * c + 64]
                assert np.array_equal(tiles.setdefault(letter, tile), tile)
    assert sorted(tiles) == sorted("SFHG")
    assert len({tile.tobytes() for tile in tiles.values()}) == 4


def test_path_reading_shows_planning_s_own_helper(folder: Path, tmp_path: Path) -> None:
    rows = lines(folder / "read/data.jsonl")
    # Planning makes its helpers of the same boards and paths.
    planned = made(PLANNING, tmp_path, maps=folder / "read/data.jsonl")
    assert [row["path"] for row in planned] == [row["path"] for row in rows]
    for row, other in zip(rows, planned, strict=True):
        assert "image_output" not in row
        assert row["task"] == READING
        assert row["image_input"] == other["image_output"]
        assert (folder / "read" / row["image_input"]).read_bytes() == (tmp_path / other["image_output"]).read_bytes()
        assert row["text_output"] == f"\\boxed{{{', '.join(row['path'])}}}" == other["text_output"]
        # The path goes from the start over ice to the goal, and red stands on its cells' centres and on no others'.
        board = row["map_desc"]
        cells = [(r, c) for r, line in enumerate(board) for c, cell in enumerate(line) if cell == 1]
        for move in row["path"]:
            cells.append((cells[-1][0] + DELTA[move][0], cells[-1][1] + DELTA[move][1]))
        assert [board[r][c] for r, c in cells] == [1, *[0] * (len(cells) - 2), 2]
        image = pixels(folder / "read" / row["image_input"])
        red = {
            (r, c)
            for r in range(len(board))
            for c in range(len(board))
            if (image[64 * r + 32, 64 * c + 32] == (255, 0, 0)).all()
        }
        assert red == set(cells)


def test_a_rows_own_path_is_read_where_it_is_right(tmp_path: Path) -> None:
    board = [[1, 0, 0], [0, -1, 0], [0, 0, 2]]
    # The third and the fourth solve it too, but no picture shows a move against the edge, or when one turned back.
    answers = ["D,D,R,R", "R,D,D,R", "U,D,D,R,R", "D,U,R,R,D,D"]
    source = tmp_path / "maps.jsonl"
    source.write_text(
        "".join(json.dumps({"map_desc": board, "text_output": f"\\boxed{{{x}}}", "id": x}) + "\n" for x in answers)
    )
    rows = made(READING, tmp_path / "o", maps=source)
    assert [row["id"] for row in rows] == answers
    assert [row["path"] for row in rows] == [
        ["DOWN", "DOWN", "RIGHT", "RIGHT"],
        *[["RIGHT", "RIGHT", "DOWN", "DOWN"]] * 3,
    ]
    # Both paths are of one length.
    assert len({pixels(tmp_path / "o" / row["image_input"]).tobytes() for row in rows}) == 2
    assert {row["text_output"] for row in made(TRANSCRIPTION, tmp_path / "t", maps=source)} == {"\\boxed{SFF/FHF/FFG}"}


@pytest.mark.parametrize("task", [TRANSCRIPTION, READING])
def test_prompts_records_and_bytes(task: str, folder: Path, tmp_path: Path) -> None:
    name = {TRANSCRIPTION: "seen", READING: "read"}[task]
    rows = lines(folder / name / "data.jsonl")
    short = {row["text_input"] for row in rows}
    assert len(short) == 1
    assert "\n" not in (prompt := short.pop())
    assert len(prompt) < 180
    count, faults = check_file(folder / name / "data.jsonl", "sft", None, None, 4)
    assert (count, faults) == (30, [])
    (full,) = {row["text_input"] for row in made(task, tmp_path / "full", count=3, prompt="full", levels=[3])}
    assert len(full) > 3 * len(prompt)
    assert full.count("<image>") == prompt.count("<image>") == 1
    assert "\\boxed{}" in full
    assert "\\boxed{}" in prompt
    for out in ("a", "b"):
        made(task, tmp_path / out, count=8, seed=5)
    files = [sorted(p.relative_to(tmp_path / out) for p in (tmp_path / out).rglob("*.*")) for out in ("a", "b")]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files[0])


@pytest.mark.parametrize("task", [TRANSCRIPTION, READING])
def test_their_own_answers_score_full(task: str, folder: Path) -> None:
    name, other = {TRANSCRIPTION: ("seen", "cells"), READING: ("read", "valid")}[task]
    rows = lines(folder / name / "data.jsonl")
    for row in rows:
        found = scores(task, f"I see.\\boxed{{}} {row['text_output']}", **row)
        assert list(found) == ["success", other, "invalid"]
        assert found == {"success": 1.0, other: 1.0, "invalid": 0.0}


BOARD = [[1, 0, 0], [0, -1, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("boxed", "success", "cells", "invalid"),
    [
        ("SFF/FHF/FFG", 1, 9, 0),
        (" sff / fhf/ ffg ", 1, 9, 0),
        ("SFF/FFF/FFG", 0, 8, 0),
        ("SFF/FHF", 0, 6, 0),
        ("SFFFHFFFG", 0, 3, 0),
        ("SFF/FHF/FFG/FFF", 0, 9, 0),
        ("SFFF/FHF/FFG", 0, 9, 0),
        ("GGG/GGG/GGG", 0, 1, 0),
        ("HSS/HSH/HHH", 0, 0, 0),
        ("1 0 0", 0, 0, 1),
        ("", 0, 0, 1),
        ("///", 0, 0, 1),
    ],
)
def test_transcription_scores(boxed: str, success: int, cells: int, invalid: int) -> None:
    found = scores(TRANSCRIPTION, f"\\boxed{{{boxed}}}", map_desc=BOARD)
    assert found == {"success": success, "cells": pytest.approx(cells / 9), "invalid": invalid}


@pytest.mark.parametrize(
    ("text", "success", "valid", "invalid"),
    [
        ("\\boxed{RIGHT, RIGHT, DOWN, DOWN}", 1, 1, 0),
        ("\\boxed{r r d d}", 1, 1, 0),
        ("\\boxed{DOWN, DOWN, RIGHT, RIGHT}", 0, 1, 0),
        ("\\boxed{UP, RIGHT, RIGHT, DOWN, DOWN}", 0, 1, 0),
        ("\\boxed{RIGHT, RIGHT, DOWN}", 0, 0, 0),
        ("\\boxed{RIGHT, DOWN, DOWN, RIGHT}", 0, 0, 0),
        ("RIGHT, RIGHT, DOWN, DOWN", 0, 0, 1),
        ("\\boxed{}", 0, 0, 1),
    ],
)
def test_path_reading_scores(text: str, success: int, valid: int, invalid: int) -> None:
    found = scores(READING, text, map_desc=BOARD, path=["RIGHT", "RIGHT", "DOWN", "DOWN"])
    assert found == {"success": success, "valid": valid, "invalid": invalid}


@pytest.mark.parametrize("board", [None, 3, "map", {}, [], [[1]], [1, "x"], True, [[3, 0], [0, 2]]])
@pytest.mark.parametrize("task", [TRANSCRIPTION, READING])
def test_what_cannot_be_scored_is_a_sentence(task: str, board: Any) -> None:
    with pytest.raises(UserError, match="the record to score: map_desc"):
        scores(task, "\\boxed{RIGHT}", map_desc=board, path=["RIGHT"])
    with pytest.raises(UserError, match="record on line 1 has no 'map_desc'"):
        scores(task, "\\boxed{RIGHT}", path=["RIGHT"])


def test_no_path_is_none() -> None:
    assert scores(READING, "\\boxed{}", map_desc=BOARD, path=[])["success"] == 0
    with pytest.raises(UserError, match="record on line 1 has no 'path'"):
        scores(READING, "\\boxed{RIGHT}", map_desc=BOARD)


@pytest.mark.parametrize("task", [TRANSCRIPTION, READING])
def test_a_rationale_has_no_helper_to_stand_around(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mirage-ds", "data", "build", *map(str, arguments)])
        try:
            main()
        except SystemExit as leave:
            return int(leave.code or 0)
        return 0

    out = tmp_path / "o"
    assert call(task, "--out", out, "--answer", "cot") == 2
    assert capsys.readouterr().err == "error: Invalid value for '--answer': 'cot' is not 'direct'.\n"
    assert not out.exists()
    assert call(task.replace("-", "_"), "--out", out, "--count", 4, "--levels", 3, "--cell_size", 28) == 0
    assert pixels(out / lines(out / "data.jsonl")[0]["image_input"]).shape == (84, 84, 3)
