"""Rows that teach a base model to read drawn paths, never to plan: each shows the board of another map.

    python examples/study2/reading_rows.py planning/data.jsonl --out reading

The answer is the path of the row's helper picture. The board in the question is that of the next map of the same level:
only the helper tells the answer.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import click


@click.command()
@click.argument("planning", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write data.jsonl into.")
def main(planning: Path, out: Path) -> None:
    """Give each row of PLANNING the board of another map."""
    rows = [json.loads(line) for line in planning.read_text().splitlines()]
    levels: dict[int, list[dict]] = defaultdict(list)
    for row in rows:
        levels[row["level"]].append(row)
    # The last map of a level gets the first one's board.
    boards = {
        row["map_id"]: other["image_input"]
        for level in levels.values()
        for row, other in zip(level, level[1:] + level[:1], strict=True)
    }
    out.mkdir(parents=True)
    with (out / "data.jsonl").open("w") as file:
        for row in rows:
            images = {"image_input": boards[row["map_id"]], "image_output": row["image_output"]}
            paths = {name: os.path.relpath(planning.parent / image, out) for name, image in images.items()}
            file.write(json.dumps(row | paths) + "\n")
    print(f"{out}/data.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
