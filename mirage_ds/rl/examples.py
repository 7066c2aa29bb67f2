"""What is shown of a rollout: a prompt's answers as Markdown, in TensorBoard and in a study's report. Imports no torch.

A line is one of run/completions.jsonl (report.py).
"""

import textwrap
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from mirage_ds.data.images import ImageFinder, decoded

FILE = "completions.jsonl"
Line = dict[str, Any]
# Letters of a verbatim line: what shows Markdown may not wrap it.
_WIDTH = 100
# Of a picture, in pixels.
SIDE = 320


def told(lines: Sequence[Line]) -> tuple[Line, str]:
    """Choose the prompt of a rollout that tells most, and write what it was answered.

    Args:
        lines: of the whole rollout; the answers to a prompt stand one behind the other.

    Returns:
        A line of the first prompt that is rewarded most variously; its question and, best first, two of the best and
        two of the worst of its answers, with latents marked, rewards and advantages.
    """
    groups = [list(own) for _, own in groupby(lines, key=lambda one: (one["file"], one["line"]))]
    own = max(groups, key=lambda group: len({one["reward"] for one in group}))
    own.sort(key=lambda one: -one["advantage"])
    parts = [f"Line {own[0]['line']}, {len(own)} answers.", _verbatim(own[0]["question"])]
    for one in own[:2] + own[2:][-2:]:
        rewards = ", ".join(f"{name} {_number(value)}" for name, value in one["rewards"].items())
        said = f"Reward {_number(one['reward'])} ({rewards}), advantage {one['advantage']:+.2f}:"
        parts += [said, _verbatim(one["answer"])]
    return own[0], "\n\n".join(parts)


def picture_of(line: Line, image_root: Path | None) -> Image.Image | None:
    """Return the first picture of a line's prompt, of at most SIDE pixels; None where it has none, or it is gone."""
    finder = ImageFinder.beside(Path(line["file"]), image_root)
    places = [place for path in line["image_input"][:1] for place in finder.places(path)]
    # A broken picture may raise anything (images.fault_of), and is no reason to end a run.
    with suppress(Exception):
        return next((small(decoded(place)) for place in places if place.is_file()), None)
    return None


def small(image: Image.Image) -> Image.Image:
    """Shrink a picture in place to at most SIDE pixels, and return it."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _verbatim(text: str) -> str:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, _WIDTH) or [""]]
    return textwrap.indent("\n".join(lines) or "(nothing)", " " * 4, lambda _: True)
