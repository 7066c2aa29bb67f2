"""Rows whose helper shows the answer's moves as letters, and no board.

    python examples/study2/letters.py planning/data.jsonl --out letters

The encoder of helpers then sees the answer's text only: how much of a drawn path's benefit is the answer itself? A
picture is as large as the board, white, with a letter a cell, row by row.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 28


def picture_of(moves: list[str], side: int) -> Image.Image:
    """Write the moves' first letters into the cells of a white board of `side` × `side`, row by row."""
    picture = Image.new("RGB", (side * CELL_PX, side * CELL_PX), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=CELL_PX * 0.8)
    for place, move in enumerate(moves):
        centre = ((place % side + 0.5) * CELL_PX, (place // side + 0.5) * CELL_PX)
        draw.text(centre, move[0], fill="black", font=font, anchor="mm")
    return picture


@click.command()
@click.argument("planning", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write data.jsonl into.")
def main(planning: Path, out: Path) -> None:
    """Give the rows of PLANNING such helpers."""
    (out / "images").mkdir(parents=True)
    rows = [json.loads(line) for line in planning.read_text().splitlines()]
    with (out / "data.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            helper = f"images/{number}.png"
            picture_of(row["path"], row["level"]).save(out / helper)
            board = os.path.relpath(planning.parent / row["image_input"], out)
            file.write(json.dumps({**row, "image_input": board, "image_output": helper}) + "\n")
    print(f"{out}/data.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
