"""The linear probe: against the normal equations, on a planted code, on noise, and on maps that repeat.

N rows, D numbers a row, J questions, K values, n rows to learn from, m to answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirage_ds.analysis.controls.statistics import POWER, visible_lift
from mirage_ds.analysis.inspect import probe
from mirage_ds.data.images import ImageFinder
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.evaluate.scoring import wilson
from mirage_ds.tasks.maps import Board, shortest_path


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(rows: int, questions: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(count, (rows, questions), generator=torch.Generator().manual_seed(seed))


def asked(labels: torch.Tensor, groups: list[str]) -> probe.Questions:
    blocks = {f"question {number}": [number] for number in range(labels.shape[1])}
    return probe.Questions("3 × 3", "maps", torch.arange(len(labels)), groups, labels, blocks)


@pytest.mark.parametrize(("n", "dimensions"), [(30, 5), (8, 20)])
def test_ridge_solves_the_normal_equations(n: int, dimensions: int) -> None:
    """Solved here in the primal; one of the numbers never changes."""
    x, rows = drawn(n, dimensions).double() * 3 + 1, drawn(4, dimensions, seed=2).double()
    y = drawn(n, 2, seed=1).double()
    x[:, 0] = rows[:, 0] = 7
    found = probe.ridge(x, y, rows, (0.1, 2.0))
    mean, spread = x.mean(0), ((x - x.mean(0)) ** 2).mean(0).sqrt()
    spread[0] = 1
    z, towards = (x - mean) / spread, (rows - mean) / spread
    for strength, answers in zip((0.1, 2.0), found, strict=True):
        penalty = strength * float(z.pow(2).sum()) / n
        weights = torch.linalg.solve(z.T @ z + penalty * torch.eye(dimensions).double(), z.T @ (y - y.mean(0)))
        torch.testing.assert_close(answers, y.mean(0) + towards @ weights)


def read(x: torch.Tensor, questions: probe.Questions) -> dict[str, probe.Reading]:
    return {block: found["x"] for block, found in probe.read({"x": x}, questions).items()}


def test_a_planted_linear_code_is_read() -> None:
    labels = classes(300, 2, 4)
    code = drawn(2, 4, 24)
    x = code[0][labels[:, 0]] + code[1][labels[:, 1]] + 0.1 * drawn(300, 24, seed=3)
    found = read(x, asked(labels, [str(row) for row in range(300)]))
    for reading in found.values():
        assert reading.accuracy > 0.98
        assert reading.low > reading.chance


def test_noise_stays_at_chance() -> None:
    labels = (classes(400, 2, 10) > 5).long()
    found = read(drawn(400, 24), asked(labels, [str(row) for row in range(400)]))
    for reading in found.values():
        assert reading.low < reading.chance < reading.high


def test_a_map_that_is_known_by_heart_helps_nobody() -> None:
    """Each map has its own vector and its own answer: whoever had seen another row of it would be right."""
    maps = classes(400, 1, 60, seed=4)[:, 0]
    labels = classes(60, 1, 4, seed=5)[maps]
    x = drawn(60, 80)[maps]
    groups = [str(number) for number in maps.tolist()]
    reading = read(x, asked(labels, groups))["question 0"]
    # Strangers' answers may even mislead; what counts is that nothing is gained.
    assert reading.low < reading.chance
    assert reading.maps == len(set(groups))
    by_row = read(x, asked(labels, [str(row) for row in range(400)]))["question 0"]
    assert by_row.accuracy > 0.95


def test_the_commonest_answer_comes_from_the_other_folds() -> None:
    labels, groups = classes(50, 2, 3), [str(row // 2) for row in range(50)]
    _, common = probe.cross_answers(drawn(50, 4), labels, groups)
    fold = probe.folds(groups)
    for row in range(50):
        others = [labels[other].tolist() for other in range(50) if fold[other] != fold[row]]
        for question in range(2):
            counts = [sum(one[question] == answer for one in others) for answer in range(3)]
            assert counts[common[row, question]] == max(counts)


def test_folds_keep_groups_together_and_are_of_one_size() -> None:
    groups = [random.Random(row).choice("abcdefghijklmnopqrst") for row in range(200)]
    fold = probe.folds(groups)
    where = {(group, int(number)) for group, number in zip(groups, fold, strict=True)}
    assert len(where) == len(set(groups)) == 20
    assert sorted(number for _, number in where) == sorted(list(range(probe.FOLDS)) * 4)


def record(board: Board, line: int = 1, **extra: object) -> Record:
    return Record(line, "", "", (), (), {"map_desc": [list(row) for row in board], **extra})


def test_questions_are_the_moves_and_the_cells() -> None:
    board = ((1, 0), (-1, 2))
    turned = ((-1, 1), (2, 0))
    rows = [record(one, path=shortest_path(one)) for one in (board, turned)]
    found = probe.questions([Record(1, "", "", (), ()), *rows])
    assert len(found) == 1
    assert found[0].rows.tolist() == [1, 2]
    assert found[0].groups[0] == found[0].groups[1]
    assert found[0].blocks == {"move 1": [0], "move 2": [1], "cells": [2, 3, 4, 5]}
    moves = [[probe.STEPS[move] for move in row] for row in found[0].labels[:, :2].tolist()]
    assert moves == [["RIGHT", "DOWN"], ["DOWN", "LEFT"]]
    cells = [[probe.CELLS[cell] for cell in row] for row in found[0].labels[:, 2:].tolist()]
    assert cells == [[1, 0, -1, 2], [-1, 1, 2, 0]]


def test_a_path_that_is_over_has_ended() -> None:
    short, long = ((1, 2), (0, 0)), ((1, 0), (-1, 2))
    found = probe.questions([record(short, path=["RIGHT"]), record(long, path=["RIGHT", "DOWN"])])[0]
    assert probe.STEPS[found.labels[0, found.blocks["move 2"][0]]] == "end"


def test_without_paths_and_of_other_sizes_the_cells_alone() -> None:
    small, large = ((1, 2), (0, 0)), ((1, 0, 0), (0, 0, 0), (0, 0, 2))
    found = probe.questions([record(large), record(small), record(large)])
    assert [(one.name, list(one.blocks), one.rows.tolist()) for one in found] == [
        ("2 × 2", ["cells"], [1]),
        ("3 × 3", ["cells"], [0, 2]),
    ]


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.fixture
def pictures(tmp_path: Path) -> ImageFinder:
    """Sixty pictures; number 59 is a copy of number 0 under another name."""
    for number in range(60):
        Image.new("RGB", (2, 2), (number % 59, 0, 0)).save(tmp_path / f"{number}.png")
    return ImageFinder((tmp_path,))


def own(extra: Callable[[int], dict[str, object]], answer: str = "x") -> list[Record]:
    return [Record(row + 1, "?", answer.format(row % 3), (f"{row}.png",), (), extra(row)) for row in range(60)]


@pytest.mark.parametrize(
    ("key", "value", "block", "classes"),
    [
        ("colour", lambda row: ["red", "blue", "green"][row % 3], "colour", [20, 20, 20]),
        ("seen", lambda row: row % 4 == 0, "seen", [45, 15]),
        ("bars", lambda row: row % 5, "bars", [12] * 5),
        ("kind", lambda row: {"b": [row % 2], "a": 1}, "kind", [30, 30]),
        # Sixty heights are asked for by quarters, and a missing one is left out.
        ("height", lambda row: None if row == 3 else row**2 / 7, "height (which quarter)", [15, 15, 14, 15]),
        ("text_output", lambda row: None, "text_output", [20, 20, 20]),
    ],
)
def test_any_label_is_asked_for(
    pictures: ImageFinder, key: str, value: Callable[[int], object], block: str, classes: list[int]
) -> None:
    records = own(lambda row: {key: value(row)}, "So \\boxed{{{}}}.")
    found = probe.labelled(records, key, pictures)
    assert (found.name, found.unit, found.blocks) == (key, "pictures", {block: [0]})
    assert sorted(torch.bincount(found.labels[:, 0]).tolist()) == sorted(classes)
    assert found.rows.tolist() == [row for row in range(60) if key == "text_output" or value(row) is not None]
    # Rows of one picture are of one fold.
    assert found.groups[-1] == found.groups[0] != found.groups[1]
    assert len(set(found.groups)) == len(found.groups) - 1


def test_a_label_without_pictures_is_of_questions(pictures: ImageFinder) -> None:
    records = [
        replace(record, image_input=(), text_input=f"? {record.line // 2}")
        for record in own(lambda row: {"a": row % 2})
    ]
    with pytest.raises(
        UserError, match=r"--label a: 2 value\(s\) in 60 records with 31 different pictures; a probe needs"
    ):
        probe.labelled(records, "a", pictures)


@pytest.mark.parametrize(("count", "chance"), [(60, 0.25), (200, 0.5), (60, 0.9)])
def test_simulated_probes_show_a_visible_lift_as_often_as_is_said(count: int, chance: float) -> None:
    lift = visible_lift(count, chance)
    hits = np.random.default_rng(count).binomial(count, chance + lift, size=4000)
    shown = sum(wilson(int(one), count)[0] > chance for one in hits) / 4000
    assert abs(shown - POWER) < 4 * (POWER * (1 - POWER) / 4000) ** 0.5
    assert visible_lift(count, 1.0) is None


def reading(accuracy: float, chance: float, maps: int = 60) -> dict[str, probe.Reading]:
    own = probe.Reading(accuracy, *wilson(accuracy * maps, maps), chance, 2 * maps, maps)
    return {"all latents": own, "helper targets": own, probe.POOLED: own._replace(accuracy=0.75)}


def test_a_probes_sentence_says_what_is_read_and_what_could_not_be_seen(pictures: ImageFinder) -> None:
    label = probe.labelled(own(lambda row: {"colour": row % 3}), "colour", pictures)
    boards = label._replace(name="4 × 4", unit="maps")
    found = [{"colour": reading(0.9, 0.4)}, {"move 1": reading(0.5, 0.4), "move 2": reading(0.3, 0.5)}]
    lift = 100 * max(visible_lift(60, 0.4), visible_lift(60, 0.5))
    image = "the input image 75.0) of 120 rows with 60"
    assert probe.sentence([label, boards], found) == (
        "A linear probe reads from the latents colour in 90.0 % (95 % interval 79.9 to 95.3, the commonest answer "
        f"40.0, {image} pictures; it finds move 1 (4 × 4) in 50.0 % (95 % interval 37.7 to 62.3, the commonest answer "
        f"40.0, {image} maps and move 2 (4 × 4) in 30.0 % (95 % interval 19.9 to 42.5, the commonest answer 50.0, "
        f"{image} maps, not above the commonest answer, where less than {lift:.1f} points more would be missed more "
        "than 1 time in 5; whether the answer uses the latents, only `mirage-ds controls` tells."
    )
    said = probe.sentence([label], [{"colour": reading(1.0, 1.0)}])
    assert said.startswith("A linear probe finds colour in 100.0 %")
    assert "not above the commonest answer, where nothing could be more; whether" in said


def test_where_nothing_was_probed_that_is_said() -> None:
    assert probe.sentence([], []) == (
        "Nothing was tested: a probe needs --label with a key of the records, and whether the answer uses the "
        "latents, only `mirage-ds controls` tells."
    )
