"""The size of the house, a line a package, beside its bound: `python -m benchmarks.house`.

Lines of code are those that hold a token which is no comment, docstring or blank. A room is a loose module or a package
of mirage_ds; an arrow is one room that imports another; a floor is the length of the longest way down the arrows. Words
of documentation leave out the log, the API page and the study's reports. Exit code 1 where something is above its
bound; a bound may be raised with a reason, beside it.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPO = Path(__file__).parents[1]
ROOT = REPO / "mirage_ds"
# Lines of code a room may have: what it has, rounded up. They only go down, but for a feature that is named here.
# The house of 2026-11-29 had 19,935 lines. The first day (own data in every form, one command, scorers, words for
# results, configurations of other trainers, the wheel) added 1,250 where 700 were meant; stage 2's speed 920 where 600
# were (with the tower's one call, the head's rounding, Liger, saves beside the steps, the plan's host and checkpoint).
# Decoding like an engine: 1,400 (continuous decoding and latents in plain transformers 480, serving 630, the field's
# harnesses 150). Reinforcement: 1,800. Then 460 lines of the first ones went in data, tasks and curate, 190 in others,
# and 210 in engine, cluster, tasks and curate; a bank of latents, drawn latents, resume and pages of rl took 280.
ROOMS = {
    # 15: tokens that run in several passes. 20: images hidden from text behind latents. 80: regions of the input image.
    "data": 3245,
    # 25: a scaffold in a chain. 35: measures of latents by arm.
    "study": 2335,
    # 25: the doctor looks at records as training reads them.
    "cluster": 2520,
    # 130: how alike latents are; learned targets as the oracle.
    "analysis": 1770,
    # 50: the rest of a mixture, what evaluate lacks, glob patterns to import.
    "curate": 1130,
    # Three published data sets (150) and JSON arrays.
    "tasks": 1660,
    # 30: export of an encoder.
    "engine": 1750,
    # 30 of them tell a quantised checkpoint by its tensor names, and a prefix before them. 260: layers.py, the passes'
    # gradients. 340: continuous decoding (kv_cache, choose, slots, latent_generate); 100: tower, head, kernels.
    # 90: latents of a block made together, in training and in decoding. 40: hidden images.
    "model": 2950,
    # 30: the first look at a source, for the doctor; stage2 without latents. 20: how alike latents are.
    # 85: an encoder trained, saved and noted. 15: a start whose latents can be made together.
    "run": 2055,
    "plan": 1275,
    # 10: blocks that a model of regions ends itself.
    "evaluate": 1010,
    # The table of other trainers' names (100 lines, nearly all of them data), and `config import` (330).
    # Help under headings, one way to a run's settings: 25. 10: a region among the columns.
    "config": 960,
    "api": 220,
    # What a wheel ships, and the commands that show and write it: docs, examples, launch.
    "files": 200,
    "cli": 220,
    "train": 160,
    "errors": 60,
    # Listens to Ctrl-C before anything is imported.
    "__main__": 10,
    # The name under which launch scripts outside of this repository read a hostfile.
    "hosts": 3,
    # OpenAI's chat completions.
    "serve": 685,
    # Rollouts, rewards, objectives.
    "rl": 1190,
    # The client of OpenAI-compatible servers, out of curate, for judges too.
    "chat": 150,
}
TOTAL = 25_500
FILE_LINES, FUNCTION_LINES = 400, 80
# 101: a study asks tasks for the level of a record, where it had a copy of that function. 103: replay shows tables.
# 124: serve 6, rl and chat 15. 126: serve takes the conditions of controls, a study shows rollouts.
FLOORS, ARROWS = 13, 126
# 370 words more: other trainers' configurations, three published data sets.
# 180 more: one command, its lines, completion.
# 30 more: a held-out part, who scores own columns, what the doctor takes.
# 1,400: what stage 2 holds, moves and asks of the host; what a card would be asked; replay.
# 2,000: serving, public benchmarks, reinforcement, decoding.
# 600: peers, checkpoints beside steps, lost hosts, chunks and kernels; continuous decoding.
# 700: learned targets, how alike latents are.
# 150: latents made together. 140: hidden images. 250: regions of the input, what makes a caption arm fair.
README_LINES, DOC_WORDS = 150, 32_300
# Not prose that somebody reads from the start: dated results, and what a command has made.
NO_PROSE = {"log.md", "api.md", "study.md", "study_rl.md", "study2_plan.md"}


def code_lines(text: str) -> int:
    """Count the lines that hold code."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines.difference_update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return len(lines)


def room_of(name: str) -> str:
    """Return the room of a module such as `mirage_ds.data.index`."""
    return name.split(".")[1] if "." in name else ""


def modules() -> dict[str, Path]:
    """Map the name of each module to its file."""
    return {
        ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(ROOT.rglob("*.py"))
    }


def imported(text: str, names: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of this project that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mirage_ds"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names else str(node.module)


def arrows(names: dict[str, Path]) -> set[tuple[str, str]]:
    """Return the pairs of rooms of which the first imports the second."""
    pairs = {
        (room_of(name), room_of(other)) for name, file in names.items() for other in imported(file.read_text(), names)
    }
    return {(one, other) for one, other in pairs if one and other and one != other}


def floors(pairs: set[tuple[str, str]]) -> int:
    """Return the number of rooms on the longest way down; a room that imports its importer is taken once."""

    @cache
    def depth(room: str, above: frozenset[str]) -> int:
        below = {other for one, other in pairs if one == room and other not in above}
        return 1 + max((depth(other, above | {room}) for other in below), default=0)

    return max(depth(room, frozenset()) for room, _ in pairs)


def longest_function() -> tuple[int, str]:
    """Return the lines of the longest function, from its def to its end, and where it is."""
    found = []
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(((node.end_lineno or 0) - node.lineno + 1, f"{name}.{node.name}"))
    return max(found)


def words(file: Path) -> int:
    """Count the words of a page outside its code blocks."""
    return len(re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S).split())


def main() -> int:
    """Print the table; return 1 where a bound is broken."""
    names = modules()
    table = Table("what", "now", "bound", title="the house")
    broken = False

    def row(what: str, now: int, bound: int) -> None:
        nonlocal broken
        broken |= now > bound
        table.add_row(what, f"{now:,}", f"{bound:,}", style="red" if now > bound else None)

    sizes = {room: 0 for room in ROOMS}
    for name, file in names.items():
        room = room_of(name)
        if room:
            sizes[room] = sizes.get(room, 0) + code_lines(file.read_text())
    for room in sorted(sizes, key=lambda one: -sizes[one]):
        row(f"{room}: lines of code", sizes[room], ROOMS.get(room, 0))
    row("mirage_ds: lines of code", sum(sizes.values()), TOTAL)
    # 26: serving, the harnesses, reinforcement, the chat client. 1: how alike latents are.
    row("files", len(names), 272)
    longest_file = max((len(file.read_text().splitlines()), name) for name, file in names.items())
    row(f"longest file ({longest_file[1]})", longest_file[0], FILE_LINES)
    lines, where = longest_function()
    row(f"longest function ({where})", lines, FUNCTION_LINES)
    pairs = arrows(names)
    row("floors", floors(pairs), FLOORS)
    row("arrows between rooms", len(pairs), ARROWS)
    row("README: lines", len((REPO / "README.md").read_text().splitlines()), README_LINES)
    pages = [page for page in (REPO / "docs").glob("*.md") if page.name not in NO_PROSE]
    row("docs: words", sum(map(words, pages)), DOC_WORDS)
    Console().print(table)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
