"""The commands that the documentation shows, as words: blocks of `sh` and `console`, and indented lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"^(\w+)=(.*)$", re.DOTALL)
# What a shell runs inside a line: $(…); none of the pages nests two.
INNER = re.compile(r"\$\(([^()]*)\)")
# First words of a line outside a fence that make it a command.
INDENTED = re.compile(r"^    (?=mirage-ds |deepspeed |python |launch/|make )", re.MULTILINE)
# In running text a command is often told without what it needs.
INLINE = re.compile(r"`((?:mirage-ds|deepspeed|python -m|launch/\w+\.sh|make) [^`]*)`")
# In place of a value that a shell would have computed.
VALUE = "VALUE"
ELLIPSIS = "…"


@dataclass(frozen=True)
class Shown:
    """One command of a page.

    Attributes:
        page, line: where it stands, the line counted from 1.
        words: the command and its arguments, without assignments before it.
        settings: those assignments.
        partial: an ellipsis stood among the words; it has been taken out.
    """

    page: Path
    line: int
    words: tuple[str, ...]
    settings: tuple[str, ...] = ()
    partial: bool = False

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {' '.join(self.words)}"


def shown_in(page: Path) -> list[Shown]:
    """List the commands of a Markdown page."""
    text = page.read_text()
    found: list[Shown] = []
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start()) + 2
        if block[1] == "sh":
            found += _block(page, first, block[2])
        if block[1] == "console":
            for number, line in enumerate(block[2].splitlines()):
                found += _block(page, first + number, line[2:]) if line.startswith("$ ") else []
    # Spaces in place of the fences: lines keep their numbers.
    outside = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for line in INDENTED.finditer(outside):
        number = outside.count("\n", 0, line.start()) + 1
        found += _block(page, number, outside[line.end() :].split("\n", 1)[0])
    return found


def mentioned_in(page: Path) -> list[Shown]:
    """List the commands in a page's running text; of alternatives (`a | b`) the first."""
    text = FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())
    return [
        Shown(page, text.count("\n", 0, span.start()) + 1, tuple(shlex.split(span[1].split("|")[0])), partial=True)
        for span in INLINE.finditer(text)
    ]


def _block(page: Path, first: int, text: str) -> Iterator[Shown]:
    """Read the lines of one block; a variable that it sets is put in where it is used."""
    variables: dict[str, str] = {}
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        begin, line = at, lines[at]
        while line.rstrip().endswith("\\"):
            at += 1
            line = line.rstrip()[:-1] + lines[at]
        at += 1
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        assigned = ASSIGNMENT.match(line)
        for inner in INNER.findall(line):
            yield from _commands(page, first + begin, inner)
        if assigned and " " not in assigned[1]:
            words = shlex.split(INNER.sub(VALUE, line), comments=True)
            if len(words) == 1:
                variables[assigned[1]] = words[0].split("=", 1)[1]
                continue
        yield from _commands(page, first + begin, INNER.sub(VALUE, line))


def _commands(page: Path, number: int, line: str) -> Iterator[Shown]:
    """Split a line at &&, ||, | and ; into its commands."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set("|&;"):
            words.append(word)
            continue
        settings = 0
        while settings < len(words) and ASSIGNMENT.match(words[settings]):
            settings += 1
        # Behind a flag it stands for the flag's value, elsewhere for more words.
        full = [
            VALUE if word == ELLIPSIS and at and words[at - 1].startswith("--") else word
            for at, word in enumerate(words)
        ]
        kept = tuple(word for word in full[settings:] if word != ELLIPSIS)
        if kept:
            yield Shown(page, number, kept, tuple(words[:settings]), partial=ELLIPSIS in full)
        words = []
