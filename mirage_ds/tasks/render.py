"""Pictures of boards: gymnasium's own FrozenLake tiles, taken once per process and composed with PIL.

Composing is some hundred times faster than an environment a picture and, at 64 px a cell and up to 8 x 8 cells, equal
to the real renderer bit for bit (beyond 8 x 8 the real one shrinks its cells, this one does not).
"""

import hashlib
import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

from PIL import Image, ImageDraw

from mirage_ds.config.extras import need
from mirage_ds.tasks.draft import Picture
from mirage_ds.tasks.maps import GOAL, HOLE, ICE, MOVES, START, Board, Cell, find, follow, map_hash

RENDERED_CELL = 64
RED = (255, 0, 0)

# pygame greets on stdout, and without an audio device ALSA floods stderr.
_QUIET = {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}


@cache
def _rendered_tiles() -> dict[tuple[int, str | None], Image.Image]:
    """Take every tile from the real renderer: (what lies there, the agent's facing or None) -> picture.

    Every cell is drawn within its own square, so a tile does not depend on its neighbours.
    """
    need("vsp", "a VSP task, which draws maps,")
    with mock.patch.dict(os.environ, _QUIET):
        import gymnasium

        env = gymnasium.make("FrozenLake-v1", desc=["SF", "HG"], is_slippery=False, render_mode="rgb_array")
        env.reset(seed=0)
        lake: Any = env.unwrapped  # gymnasium's types do not know this environment's own fields
        kinds = (START, ICE, HOLE, GOAL)  # the board's cells in reading order
        tiles: dict[tuple[int, str | None], Image.Image] = {}
        for agent in range(4):
            for action, facing in enumerate(MOVES):
                lake.s, lake.lastaction = agent, action
                picture = Image.fromarray(lake.render())
                for cell, kind in enumerate(kinds):
                    row, column = divmod(cell, 2)
                    left, top = column * RENDERED_CELL, row * RENDERED_CELL
                    square = picture.crop((left, top, left + RENDERED_CELL, top + RENDERED_CELL))
                    tiles[kind, facing if cell == agent else None] = square
        env.close()
    return tiles


@cache
def load_tiles(cell_size: int) -> dict[tuple[int, str | None], Image.Image]:
    """Return the tiles at `cell_size` px; each tile is scaled alone, so that no cell bleeds into the next.

    Whoever draws in threads calls it before: the renderer is no matter for threads.
    """
    tiles = _rendered_tiles()
    if cell_size == RENDERED_CELL:
        return tiles
    return {key: image.resize((cell_size, cell_size), Image.Resampling.LANCZOS) for key, image in tiles.items()}


def render(
    board: Board, agent: Cell | None = None, facing: str | None = None, cell_size: int = RENDERED_CELL
) -> Image.Image:
    """Draw the board as the real renderer does.

    Args:
        agent: where the agent stands; the start cell by default. A start cell that it has left shows its stool; in a
            hole the ice is cracked and the agent gone.
        facing: the last move, a name of `MOVES`; None before the first, when the agent faces down.
        cell_size: px a cell.

    Returns:
        RGB picture of side * cell_size px each way.

    Raises:
        UserError: gymnasium 1.2.3 or pygame is not installed.
    """
    tiles = load_tiles(cell_size)
    agent = find(board, START) if agent is None else agent
    picture = Image.new("RGB", (len(board) * cell_size, len(board) * cell_size))
    for r, row in enumerate(board):
        for c, kind in enumerate(row):
            looks = (facing or "DOWN") if (r, c) == agent else None
            picture.paste(tiles[kind, looks], (c * cell_size, r * cell_size))
    return picture


def red_path(image: Image.Image, cells: Sequence[Cell], cell_size: int = RENDERED_CELL) -> Image.Image:
    """Return a copy of `image` with the way through `cells` in red: one line a step, each with a small arrow-head.

    The lines run through the cells' centres and are 5 px wide at 64 px a cell, as in the public pictures; the tip of
    each head stands on the centre of the cell it leads to. A step that stays put draws nothing.
    """
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    width = max(1, round(5 * cell_size / RENDERED_CELL))
    length, half = 12 * cell_size / RENDERED_CELL, 7 * cell_size / RENDERED_CELL
    centres = [(column * cell_size + cell_size // 2, row * cell_size + cell_size // 2) for row, column in cells]
    for (x0, y0), (x1, y1) in pairwise(centres):
        distance = math.hypot(x1 - x0, y1 - y0)
        if not distance:
            continue
        dx, dy = (x1 - x0) / distance, (y1 - y0) / distance
        draw.line([(x0, y0), (x1, y1)], fill=RED, width=width)
        x, y = x1 - length * dx, y1 - length * dy
        draw.polygon([(x1, y1), (x - half * dy, y + half * dx), (x + half * dy, y - half * dx)], RED)
    return picture


def _picture_name(board: Board, cell_size: int, what: str) -> str:
    """Name a picture by its level, its map, its scale and what it shows."""
    return f"level_{len(board)}/{map_hash(board)[:16]}_{cell_size}px_{what}"


def state_picture(board: Board, cell: Cell, facing: str | None, cell_size: int) -> Picture:
    """Return the picture of the board with the agent at `cell`, facing as after the move `facing` (None: at first)."""
    what = "start" if facing is None else f"r{cell[0]}c{cell[1]}_{facing.lower()}"
    return Picture.drawn(_picture_name(board, cell_size, what), lambda: render(board, cell, facing, cell_size))


def path_picture(board: Board, moves: Sequence[str], cell_size: int) -> Picture:
    """Return the picture of the board at first, with the path of `moves` in red."""
    way = hashlib.sha256("".join(moves).encode()).hexdigest()[:8]
    cells = follow(board, moves)
    name = _picture_name(board, cell_size, f"path_{way}")
    return Picture.drawn(name, lambda: red_path(render(board, cell_size=cell_size), cells, cell_size))
