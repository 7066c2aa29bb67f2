"""Own pictures, helpers and questions: which disc is the second largest? The helper is the picture with it ringed."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")
PLACES = ((8, 8), (64, 8), (8, 64), (64, 64))
Path("pictures").mkdir(exist_ok=True)
for split, count, seed in (("train", 1000, 0), ("test", 400, 1)):
    draw_from, rows = random.Random(seed), []
    for number in range(count):
        colours, sizes = draw_from.sample(COLOURS, 4), draw_from.sample(range(8, 45, 9), 4)
        image = Image.new("RGB", (112, 112), "white")
        pen = ImageDraw.Draw(image)
        for colour, size, (x, y) in zip(colours, sizes, PLACES, strict=True):
            pen.ellipse((x, y, x + size, y + size), fill=colour)
        image.save(f"pictures/{split}{number}.png")
        second = sorted(range(4), key=lambda i: sizes[i])[2]
        (x, y), size = PLACES[second], sizes[second]
        pen.ellipse((x - 4, y - 4, x + size + 4, y + size + 4), outline="black", width=3)
        image.save(f"pictures/{split}{number}-ringed.png")
        row = {"text_input": "<image>Which disc is the second largest?", "text_output": f"\\boxed{{{colours[second]}}}"}
        names = {"image_input": f"pictures/{split}{number}.png", "image_output": f"pictures/{split}{number}-ringed.png"}
        rows.append(row | names | {"task": "boxed"})
    Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
