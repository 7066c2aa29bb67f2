"""Somebody's own data: bar charts as PNGs, helpers that outline the tallest bar, and a CSV that names them.

python draw.py        writes train.csv (300 rows), test.csv (100 fresh rows) and their pictures into this folder
"""

import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

NAMES, COLOURS = "ABCD", ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")


def chart(heights: list[int], outlined: int | None = None) -> Image.Image:
    """Draw one chart, 112 × 84 px."""
    image = Image.new("RGB", (112, 84), "white")
    pen = ImageDraw.Draw(image)
    for at, (name, colour, height) in enumerate(zip(NAMES, COLOURS, heights, strict=True)):
        left = 28 * at + 5
        pen.rectangle((left, 70 - height, left + 18, 70), fill=colour)
        pen.text((left + 6, 71), name, fill="black")
        if at == outlined:
            pen.rectangle((left - 4, 66 - height, left + 22, 74), outline="black", width=3)
    return image


for split, count in (("train", 300), ("test", 100)):
    draw_from = random.Random(split)
    Path(split).mkdir()
    with Path(f"{split}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "chart", "outlined", "question", "answer"])
        for number in range(count):
            heights = draw_from.sample(range(8, 61, 13), 4)
            tallest = heights.index(max(heights))
            pictures = f"{split}/{number:03}.png", f"{split}/{number:03}-outlined.png"
            chart(heights).save(pictures[0])
            chart(heights, tallest).save(pictures[1])
            table.writerow([number, *pictures, "Which bar is the tallest?", NAMES[tallest]])
