"""Rows that teach a base model to see, never to plan: copy a map, then read a path out of another map's helper.

    python examples/study/base_rows.py transcription/data.jsonl planning/data.jsonl --out base

Each row shows one map, whose letters are to be written, and feeds the latents of *another* map's helper picture, whose
path is to be written then. What the path is, only the latents tell: the picture is of a map that has another one. Both
files are built by `mirage-ds data build`; rows are paired in order, and the helper's map is of the same level.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import click

QUESTION = "<image>Copy the map, then read the path."


def rows_of(file: Path) -> list[dict]:
    """Read a records file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@click.command()
@click.argument("transcription", type=click.Path(path_type=Path))
@click.argument("planning", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write data.jsonl into.")
def main(transcription: Path, planning: Path, out: Path) -> None:
    """Join the rows of TRANSCRIPTION and PLANNING."""
    helpers: dict[int, list[dict]] = defaultdict(list)
    for row in rows_of(planning):
        helpers[row["level"]].append(row)
    out.mkdir(parents=True)
    written = 0
    with (out / "data.jsonl").open("w") as file:
        for row in rows_of(transcription):
            others = helpers[row["level"]]
            if not others or others[-1]["map_desc"] == row["map_desc"]:
                continue
            other = others.pop()
            joined = {
                "text_input": QUESTION,
                "text_output": f"{row['text_output']}<output_image>{other['text_output']}",
                "image_input": os.path.relpath(transcription.parent / str(row["image_input"]), out),
                "image_output": os.path.relpath(planning.parent / str(other["image_output"]), out),
                # What is scored is the last box: the path of the map whose helper was shown.
                "map_desc": other["map_desc"],
                "level": other["level"],
                "task": other["task"],
            }
            file.write(json.dumps(joined) + "\n")
            written += 1
    print(f"{out}/data.jsonl: {written} rows")


if __name__ == "__main__":
    main()
