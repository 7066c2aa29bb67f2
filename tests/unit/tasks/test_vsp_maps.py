"""Boards: gymnasium is the oracle of moves, enumeration of all plans the oracle of shortest paths."""

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from mirage_ds.errors import UserError
from mirage_ds.tasks import get_task, maps
from mirage_ds.tasks.boxed import last_boxed
from mirage_ds.tasks.vsp_reasoning import draw_plan, outcome

ROWS = Path(__file__).parents[2] / "fixtures" / "vsp_planning_rows.jsonl"
PUBLIC = [json.loads(line) for line in ROWS.read_text().splitlines()]
LETTERS = {1: "S", 2: "G", -1: "H", 0: "F"}
ACTIONS = ["LEFT", "DOWN", "RIGHT", "UP"]


def boards(count, rate=0.3, sides=(3, 4, 5, 6), seed=0):
    rng = random.Random(seed)
    return [maps.random_board(sides[i % len(sides)], rate, rng) for i in range(count)]


def enumerate_shortest(board, longest=7):
    """All shortest plans by trying every plan, on plain lists, with no code of the package."""
    side = len(board)
    start = next((r, c) for r in range(side) for c in range(side) if board[r][c] == 1)
    delta = {"LEFT": (0, -1), "DOWN": (1, 0), "RIGHT": (0, 1), "UP": (-1, 0)}
    for length in range(1, longest + 1):
        good = set()
        for plan in itertools.product(ACTIONS, repeat=length):
            r, c = start
            for move in plan:
                r, c = r + delta[move][0], c + delta[move][1]
                if not (0 <= r < side and 0 <= c < side) or board[r][c] == -1:
                    break
            else:
                if board[r][c] == 2:
                    good.add(plan)
        if good:
            return good
    return None


def test_follow_is_gymnasiums_stepping():
    import gymnasium

    rng = random.Random(1)
    met = Counter()
    for board in boards(60):
        desc = ["".join(LETTERS[cell] for cell in row) for row in board]
        env = gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=False).unwrapped
        env.reset(seed=0)
        plan = [rng.choice(ACTIONS) for _ in range(12)]
        expected = [maps.find(board, maps.START)]
        for move in plan:
            state, _, done, _, _ = env.step(ACTIONS.index(move))
            expected.append(divmod(state, len(board)))
            if done:  # gymnasium also stops on the goal, follow only in a hole
                break
        met[desc[expected[-1][0]][expected[-1][1]]] += 1
        assert maps.follow(board, plan)[: len(expected)] == expected
        if desc[expected[-1][0]][expected[-1][1]] == "H":
            assert maps.follow(board, plan) == expected
    assert min(met["H"], met["F"]) > 5
    assert met["G"] > 0


def test_shortest_paths_are_those_that_trying_every_plan_finds():
    rng = random.Random(2)
    ambiguous = 0
    for board in boards(60, sides=(3, 4), rate=0.4, seed=3):
        good = enumerate_shortest(board)
        if good is None:
            continue
        ambiguous += len(good) > 1
        assert maps.count_shortest_paths(board) == len(good)
        assert tuple(maps.shortest_path(board)) in good
        order = ("UP", "LEFT", "RIGHT", "DOWN")
        assert tuple(maps.shortest_path(board)) == min(good, key=lambda plan: [order.index(move) for move in plan])
        assert tuple(maps.shortest_path(board, rng)) in good
    assert ambiguous > 10


def test_random_ties_draw_every_shortest_path_equally():
    board = maps.parse_board([[1, 0, 0], [0, 0, 0], [0, 0, 2]], "x")
    drawn = Counter(tuple(maps.shortest_path(board, random.Random(seed))) for seed in range(1800))
    assert set(drawn) == enumerate_shortest(board)
    assert len(drawn) == 6
    assert min(drawn.values()) > 240  # 300 expected, standard deviation 16


def test_a_board_without_a_path():
    board = maps.parse_board([[1, -1], [-1, 2]], "x")
    assert maps.count_shortest_paths(board) == 0
    with pytest.raises(ValueError, match="no path"):
        maps.shortest_path(board)
    with pytest.raises(UserError, match=r"^f.jsonl, line 7: no path leads from the start to the goal"):
        maps.check_solvable(board, "f.jsonl, line 7")


def test_the_rule_agrees_with_the_public_labels():
    """On all 1,000 public rows the rule gives 502 of the 526 ambiguous labels; here on 40 rows."""
    same = ambiguous = 0
    for row in PUBLIC:
        board = maps.parse_board(row["map_desc"], "x")
        label = last_boxed(row["text_output"]).split(", ")
        assert len(label) == len(maps.shortest_path(board))
        if maps.count_shortest_paths(board) > 1:
            ambiguous += 1
            same += label == maps.shortest_path(board)
    assert ambiguous >= 10
    assert same >= 0.85 * ambiguous


def test_random_boards_keep_to_the_rate():
    seen = Counter()
    for side, most in ((3, 1), (4, 3), (5, 5), (6, 7)):
        rng = random.Random(side)
        for _ in range(300):
            board = maps.random_board(side, 0.2, rng)
            flat = [cell for row in board for cell in row]
            assert (flat.count(1), flat.count(2), len(flat)) == (1, 1, side * side)
            assert flat.count(-1) <= most
            assert maps.count_shortest_paths(board) > 0
            seen[side] += flat.count(-1)
    assert seen[6] / 300 / 36 > 0.12  # the released maps' mean share is .18
    assert maps.random_board(4, 0.0, random.Random(0))


def test_hash_and_symmetries_against_numpy():
    import numpy as np

    for board in boards(20):
        array = np.array(board)
        images = [np.rot90(image, k) for image in (array, array.T) for k in range(4)]
        expected = [hashlib.sha256(json.dumps(i.tolist(), separators=(",", ":")).encode()).hexdigest() for i in images]
        assert maps.map_hash(board) == expected[0]
        assert len(list(maps.symmetries(board))) == 8
        assert maps.symmetry_hashes(board) == set(expected)
        assert len({maps.split_of(tuple(map(tuple, i.tolist()))) for i in images}) == 1


def test_the_hash_is_pinned():
    """The published list's spelling: json.dumps(map_desc, separators=(",", ":")), UTF-8."""
    board = maps.parse_board([[1, 0], [-1, 2]], "x")
    assert maps.map_hash(board) == hashlib.sha256(b"[[1,0],[-1,2]]").hexdigest()


def test_splits_have_their_shares():
    shares = Counter(maps.split_of(board) for board in boards(1500, sides=(6,)))
    assert 0.75 < shares["train"] / 1500 < 0.85
    assert 0.07 < shares["dev"] / 1500 < 0.13
    assert set(shares) == {"train", "dev", "test"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("SFFG", "map_desc is not a list of rows"),
        ([1, 2], "map_desc is not a list of rows"),
        ([[1, 0, 0], [0, 2], [0, 0, 0]], "map_desc has 3 rows of 2 and 3 cells; give a square board"),
        ([[1, 0, 2], [0, 0, 0]], "map_desc has 2 rows of 3 cells; give a square board"),
        ([], "map_desc has 0 rows of no cells"),
        ([[1, 3], [0, 2]], "map_desc holds 3; cells are 1"),
        ([[1, True], [0, 2]], "map_desc holds True; cells are 1"),
        ([[1, "0"], [0, 2]], "map_desc holds '0'; cells are 1"),
        ([[1, 1], [0, 2]], r"map_desc has 2 cells of the start \(1\); give exactly one"),
        ([[1, 0], [0, 0]], r"map_desc has 0 cells of the goal \(2\); give exactly one"),
    ],
)
def test_bad_boards(value, says):
    with pytest.raises(UserError, match="^rows.jsonl, line 2: " + says):
        maps.parse_board(value, "rows.jsonl, line 2")


BOARD = [[1, 0, -1], [0, 0, 0], [-1, 0, 2]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # success, optimal, invalid, moves
        (r"\boxed{RIGHT, DOWN, DOWN, RIGHT}", (True, True, False, 4)),
        (r"first \boxed{R} then \boxed{d,R,r,d}", (True, True, False, 4)),
        (r"\boxed{\text{DRDR}}", (True, True, False, 4)),
        (r"\boxed{UP, DOWN, RIGHT, DOWN, RIGHT}", (True, False, False, 5)),
        (r"\boxed{DDRR}", (False, False, False, 4)),
        (r"\boxed{DRDRL}", (False, False, False, 5)),  # leaves the goal again
        (r"\boxed{DRRRD}", (True, False, False, 5)),
        (r"\boxed{}", (False, False, True, 0)),
        (r"\boxed{stay}", (False, False, True, 0)),
        ("RIGHT, DOWN", (False, False, True, 0)),
        (r"\boxed{DRDR} and \boxed{UP", (True, True, False, 4)),
    ],
)
def test_planning_score(text, expected):
    found = get_task("vsp-spatial-planning").score_record(text, {"map_desc": BOARD})
    assert list(found) == ["success", "optimal", "invalid", "moves"]
    assert tuple(found.values()) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{A} no, \boxed{B}", "B"),
        (r"\boxed{c}", "C"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(A)}", "A"),
        (r"\boxed{B. Action Failed.}", "B"),
        (r"\boxed{D}", None),
        (r"\boxed{Action Success}", None),
        ("A", None),
    ],
)
def test_reasoning_score(text, letter):
    task = get_task("vsp-spatial-reasoning")
    assert task.parse(text, {}) == letter
    found = task.score_record(text, {"text_output": r"\boxed{B}"})
    assert list(found.items()) == [("correct", letter == "B"), ("invalid", letter is None)]


def test_drawn_plans_have_the_class_wanted_and_end_with_the_game():
    import gymnasium

    rng = random.Random(5)
    lengths = {letter: set() for letter in "ABC"}
    for number, board in enumerate(boards(180, rate=0.2, seed=9)):
        wanted = "ABC"[number % 3]
        plan = draw_plan(board, rng, wanted)
        if plan is None:
            assert wanted == "B"
            continue
        desc = ["".join(LETTERS[cell] for cell in row) for row in board]
        env = gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=False).unwrapped
        env.reset(seed=0)
        ends = [env.step(ACTIONS.index(move)) for move in plan]
        assert [done for _, _, done, _, _ in ends] == [False] * (len(plan) - 1) + [wanted != "C"]
        assert (ends[-1][1] == 1) == (wanted == "A")
        assert outcome(board, plan) == wanted
        lengths[wanted].add(len(plan))
    # No length gives the class away.
    assert all({1, 2, 3, 4} <= seen for seen in lengths.values())
