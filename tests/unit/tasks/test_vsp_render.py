"""Pictures: the real renderer, an environment stepped for real, is the oracle."""

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirage_ds.tasks import maps, render

FIXTURES = Path(__file__).parents[2] / "fixtures"
LETTERS = {1: "S", 2: "G", -1: "H", 0: "F"}
ACTIONS = ["LEFT", "DOWN", "RIGHT", "UP"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("SDL_AUDIODRIVER", "dummy")


def test_pictures_equal_the_real_renderer_bit_for_bit():
    import gymnasium

    rng = random.Random(0)
    shown = Counter()
    for number in range(48):
        board = maps.random_board((3, 4, 5, 6, 8, 2)[number % 6], 0.3 if number % 6 < 5 else 0, rng)
        desc = ["".join(LETTERS[cell] for cell in row) for row in board]
        env = gymnasium.make("FrozenLake-v1", desc=desc, is_slippery=False, render_mode="rgb_array").unwrapped
        env.reset(seed=0)
        assert np.array_equal(np.array(render.render(board)), env.render())
        # Half of them walk the way to the goal, half at random: into holes and against the edge.
        plan = maps.shortest_path(board) if number % 2 else [rng.choice(ACTIONS) for _ in range(6)]
        for done, move in enumerate(plan, 1):
            _, _, over, _, _ = env.step(ACTIONS.index(move))
            cells = maps.follow(board, plan[:done])
            picture = render.render(board, cells[-1], move)
            assert picture.mode == "RGB"
            assert np.array_equal(np.array(picture), env.render())
            shown[LETTERS[maps.tile(board, cells[-1])], move] += 1
            if over:
                break
        env.close()
    for kind in "SFGH":
        assert sum(shown[kind, move] for move in ACTIONS) >= 5
    assert all(shown["F", move] for move in ACTIONS)


def test_loading_the_tiles_leaves_the_environment_alone(monkeypatch):
    monkeypatch.delenv("SDL_AUDIODRIVER")
    monkeypatch.setenv("SDL_VIDEODRIVER", "x11")
    render._rendered_tiles.__wrapped__()
    assert os.environ["SDL_VIDEODRIVER"] == "x11"
    assert "SDL_AUDIODRIVER" not in os.environ


@pytest.mark.parametrize("size", [28, 32, 100])
def test_other_cell_sizes_scale_each_tile_alone(size):
    board = maps.random_board(4, 0.3, random.Random(1))
    picture = render.render(board, cell_size=size)
    assert picture.size == (4 * size, 4 * size)
    full = render.render(board)
    for r in range(4):
        for c in range(4):
            cell = picture.crop((c * size, r * size, (c + 1) * size, (r + 1) * size))
            alone = full.crop((c * 64, r * 64, (c + 1) * 64, (r + 1) * 64)).resize(
                (size, size), Image.Resampling.LANCZOS
            )
            assert np.array_equal(np.array(cell), np.array(alone))


def test_red_path_holds_the_public_pictures_lines():
    """The public picture of DOWN, LEFT, LEFT, UP, whose lines have no heads."""
    board = maps.parse_board([[2, -1, 1], [0, 0, 0], [0, 0, 0]], "x")
    cells = maps.follow(board, ["DOWN", "LEFT", "LEFT", "UP"])
    start = render.render(board)
    before = np.array(start)
    ours = np.array(render.red_path(start, cells))
    public = np.array(Image.open(FIXTURES / "vsp_red_path.png").convert("RGB"))
    assert np.array_equal(np.array(start), before)  # a copy is drawn on
    line = (public != before).any(-1)
    red = (ours != before).any(-1)
    assert (ours[red] == (255, 0, 0)).all()
    assert line.sum() > 1000
    assert red[line].all()
    # What is red beyond the public lines belongs to the four heads, at most 13 px from the centre they point at.
    rows, columns = np.nonzero(red & ~line)
    centres = np.array([(r * 64 + 32, c * 64 + 32) for r, c in cells[1:]])
    near = np.hypot(rows[:, None] - centres[:, 0], columns[:, None] - centres[:, 1])
    assert (near.min(1) <= 15).all()
    assert set(near.argmin(1)) == {0, 1, 2, 3}


def test_arrow_heads_point_the_way():
    board = maps.parse_board([[1, 0, 2], [0, 0, 0], [0, 0, 0]], "x")
    blank = Image.new("RGB", (192, 192))
    there = np.array(render.red_path(blank, [(0, 0), (0, 1)]))[..., 0]
    assert there[32 + 5, 96 - 11] == 255  # the head's base lies before its tip
    assert there[32 + 5, 96 + 4] == 0
    back = np.array(render.red_path(blank, [(0, 1), (0, 0)]))[..., 0]
    assert not np.array_equal(there, back)
    stay = np.array(render.red_path(blank, [(0, 0), (0, 0)]))
    assert not stay.any()
    small = np.array(render.red_path(render.render(board, cell_size=32), [(0, 0), (0, 1)], 32))
    assert (small[16, 20:44] == (255, 0, 0)).all()
