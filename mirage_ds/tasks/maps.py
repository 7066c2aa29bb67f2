"""FrozenLake boards: the rules of moving, shortest paths, random boards, symmetries and hashes.

A board is a square of side x side cells, row by row from the top: 1 start, 2 goal, -1 hole, 0 ice. A cell is named
(row, column), counted from 0 at the top left.
"""

import hashlib
import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from mirage_ds.errors import UserError, shown

Board = tuple[tuple[int, ...], ...]
Cell = tuple[int, int]

START, GOAL, HOLE, ICE = 1, 2, -1, 0
# In the order of gymnasium's actions 0..3.
MOVES: dict[str, Cell] = {"LEFT": (0, -1), "DOWN": (1, 0), "RIGHT": (0, 1), "UP": (-1, 0)}
# Of all 24 orders the one that agrees best with the public labels: 502 of the 526 maps with several shortest paths.
TIE_ORDER = ("UP", "LEFT", "RIGHT", "DOWN")


def parse_board(value: Any, where: str) -> Board:
    """Check a `map_desc` (a list of rows) and return it as a board.

    Args:
        where: how messages call the place it came from, for instance "maps.jsonl, line 3".

    Raises:
        UserError: not a square of -1, 0, 1, 2 with one start and one goal.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in value):
        what = f"map_desc is not a list of rows, it is {shown(value)}"
        raise UserError(f"{where}: {what}; give one list of cells for each row")
    side = len(value)
    lengths = sorted({len(row) for row in value})
    if side < 2 or lengths != [side]:
        what = f"map_desc has {side} rows of {' and '.join(map(str, lengths)) or 'no'} cells"
        raise UserError(f"{where}: {what}; give a square board of at least 2 x 2")
    board = tuple(tuple(row) for row in value)
    for cell in (cell for row in board for cell in row):
        if type(cell) is not int or cell not in (START, GOAL, HOLE, ICE):
            raise UserError(f"{where}: map_desc holds {cell!r}; cells are 1 (start), 2 (goal), -1 (hole) or 0 (ice)")
    for kind, name in ((START, "start (1)"), (GOAL, "goal (2)")):
        found = sum(row.count(kind) for row in board)
        if found != 1:
            raise UserError(f"{where}: map_desc has {found} cells of the {name}; give exactly one")
    return board


def check_solvable(board: Board, where: str) -> None:
    """Raise UserError when holes part the start from the goal."""
    if find(board, START) not in distances(board):
        raise UserError(f"{where}: no path leads from the start to the goal of this map; fix or remove the row")


def find(board: Board, kind: int) -> Cell:
    """Return the first cell that holds `kind`."""
    return next((r, c) for r, row in enumerate(board) for c, cell in enumerate(row) if cell == kind)


def tile(board: Board, cell: Cell) -> int:
    """Return what lies at `cell`."""
    return board[cell[0]][cell[1]]


def step(board: Board, cell: Cell, move: str) -> Cell:
    """Return where `move` leads from `cell`; a move off the board stays put. Holes do not matter here."""
    row, column = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
    return (row, column) if 0 <= row < len(board) and 0 <= column < len(board) else cell


def follow(board: Board, moves: Sequence[str]) -> list[Cell]:
    """Return the cells stood on, the start first, one more per move; the first hole ends it.

    The goal does not end it: who walks over the goal and on has left it.
    """
    cells = [find(board, START)]
    for move in moves:
        if tile(board, cells[-1]) == HOLE:
            break
        cells.append(step(board, cells[-1], move))
    return cells


def distances(board: Board) -> dict[Cell, int]:
    """Return the number of moves to the goal for every cell that has a path to it."""
    goal = find(board, GOAL)
    found, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for move in MOVES:
            near = step(board, cell, move)
            if near not in found and tile(board, near) != HOLE:
                found[near] = found[cell] + 1
                queue.append(near)
    return found


def _path_counts(board: Board, found: dict[Cell, int]) -> dict[Cell, int]:
    """Return for every cell of `found` (its distances) the number of shortest paths to the goal."""
    counts: dict[Cell, int] = {}
    for cell, distance in found.items():  # breadth first, so nearer cells come earlier
        nearer = {step(board, cell, move) for move in MOVES}
        counts[cell] = sum(counts[near] for near in nearer if found.get(near) == distance - 1) if distance else 1
    return counts


def count_shortest_paths(board: Board) -> int:
    """Return the number of shortest paths from start to goal; 0 when there is none."""
    return _path_counts(board, distances(board)).get(find(board, START), 0)


def shortest_path(board: Board, rng: random.Random | None = None) -> list[str]:
    """Return the moves of a shortest path from start to goal.

    Args:
        rng: draws each of the shortest paths with equal probability; None takes at each cell the first fitting move of
            `TIE_ORDER`.

    Raises:
        ValueError: the board has no path.
    """
    found = distances(board)
    cell = find(board, START)
    if cell not in found:
        raise ValueError("the board has no path from start to goal")
    counts = _path_counts(board, found)
    moves: list[str] = []
    while found[cell]:
        fitting = [move for move in TIE_ORDER if found.get(step(board, cell, move)) == found[cell] - 1]
        if rng is not None and len(fitting) > 1:
            moves += rng.choices(fitting, [counts[step(board, cell, move)] for move in fitting])
        else:
            moves.append(fitting[0])
        cell = step(board, cell, moves[-1])
    return moves


def most_holes(side: int, hole_rate: float) -> int:
    """Return how many holes a board of `side` x `side` cells may have when at most `hole_rate` of it are holes."""
    return int(hole_rate * side * side + 1e-9)


def random_board(side: int, hole_rate: float, rng: random.Random) -> Board:
    """Draw a solvable board: start and goal anywhere but not on one cell, each other cell a hole with `hole_rate`.

    Boards with a larger share of holes than `hole_rate`, or without a path, are drawn again; with many holes that
    can take long, so callers keep `hole_rate` at 0.5 or below.
    """
    while True:
        start, goal = rng.sample(range(side * side), 2)
        flat = [HOLE if rng.random() < hole_rate else ICE for _ in range(side * side)]
        flat[start], flat[goal] = START, GOAL
        if flat.count(HOLE) > most_holes(side, hole_rate):
            continue
        board = tuple(tuple(flat[row * side : (row + 1) * side]) for row in range(side))
        if find(board, START) in distances(board):
            return board


def map_json(board: Board) -> str:
    """Return the board's one spelling, which its hash is taken of."""
    return json.dumps(board, separators=(",", ":"))


def map_hash(board: Board) -> str:
    """Return the SHA-256 (64 hex digits) of `map_json`, as the public list of test maps has it."""
    return hashlib.sha256(map_json(board).encode()).hexdigest()


def symmetries(board: Board) -> Iterator[Board]:
    """Yield the eight rotations and reflections of the board, itself first (some may be equal)."""
    for _ in range(4):
        yield board
        yield tuple(row[::-1] for row in board)
        board = tuple(zip(*board[::-1], strict=True))


def symmetry_hashes(board: Board) -> set[str]:
    """Return the hashes of the board's eight symmetries."""
    return {map_hash(image) for image in symmetries(board)}


def split_of(board: Board) -> str:
    """Return "train" (80 %), "dev" (10 %) or "test" (10 %), the same for all symmetries of a board and for any seed.

    It follows from the hash of the smallest spelling among the eight symmetries.
    """
    share = int(map_hash(min(symmetries(board), key=map_json))[:8], 16) % 10
    return "test" if share == 9 else "dev" if share == 8 else "train"
