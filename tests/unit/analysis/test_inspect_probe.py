"""The linear probe: against the normal equations, on a planted code, on noise, and on maps that repeat.

N rows, D numbers a row, J questions, K values, n rows to learn from, m to answer.
"""

from __future__ import annotations

import random

import pytest
import torch

from mirage_ds.analysis.inspect import probe
from mirage_ds.data.record import Record
from mirage_ds.tasks.maps import Board, shortest_path


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(rows: int, questions: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(count, (rows, questions), generator=torch.Generator().manual_seed(seed))


def asked(labels: torch.Tensor, groups: list[str]) -> probe.Questions:
    blocks = {f"question {number}": [number] for number in range(labels.shape[1])}
    return probe.Questions(3, torch.arange(len(labels)), groups, labels, blocks)


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


def test_a_planted_linear_code_is_read() -> None:
    labels = classes(300, 2, 4)
    code = drawn(2, 4, 24)
    x = code[0][labels[:, 0]] + code[1][labels[:, 1]] + 0.1 * drawn(300, 24, seed=3)
    found = probe.read(x, asked(labels, [str(row) for row in range(300)]))
    for reading in found.values():
        assert reading.accuracy > 0.98
        assert reading.low > reading.chance


def test_noise_stays_at_chance() -> None:
    labels = (classes(400, 2, 10) > 5).long()
    found = probe.read(drawn(400, 24), asked(labels, [str(row) for row in range(400)]))
    for reading in found.values():
        assert reading.low < reading.chance < reading.high


def test_a_map_that_is_known_by_heart_helps_nobody() -> None:
    """Each map has its own vector and its own answer: whoever had seen another row of it would be right."""
    maps = classes(400, 1, 60, seed=4)[:, 0]
    labels = classes(60, 1, 4, seed=5)[maps]
    x = drawn(60, 80)[maps]
    groups = [str(number) for number in maps.tolist()]
    reading = probe.read(x, asked(labels, groups))["question 0"]
    # Strangers' answers may even mislead; what counts is that nothing is gained.
    assert reading.low < reading.chance
    assert reading.maps == len(set(groups))
    by_row = probe.read(x, asked(labels, [str(row) for row in range(400)]))["question 0"]
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
    assert [(one.side, list(one.blocks), one.rows.tolist()) for one in found] == [
        (2, ["cells"], [1]),
        (3, ["cells"], [0, 2]),
    ]
