"""Figures and tables → one HTML file that needs nothing beside it, by the macros of page.html."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

if TYPE_CHECKING:
    from mirage_ds.analysis.inspect.look import Look
    from mirage_ds.analysis.inspect.measure import Words
    from mirage_ds.analysis.inspect.probe import Reading

_FOLDER = FileSystemLoader(Path(__file__).parent)
_MACROS: Any = Environment(loader=_FOLDER, autoescape=True, trim_blocks=True).get_template("page.html").module


class Shown(NamedTuple):
    """A figure as it goes into the page: PNG bytes, what it shows for who does not see it, and how to read it."""

    png: bytes
    alt: str
    caption: str

    @property
    def url(self) -> str:
        """The picture itself, as a link that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


class Section(NamedTuple):
    """One part of the page: its heading, HTML in front of the figures, and the figures."""

    heading: str
    html: str
    figures: list[Shown]


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Write names and texts, the texts as they are."""
    return str(_MACROS.facts(pairs))


def paragraph(text: str) -> str:
    """Write one paragraph."""
    return str(_MACROS.paragraph(text))


def _word_table(name: str, words: Words, spellings: Mapping[int, str]) -> str:
    pairs = zip(words.ids.T.tolist(), words.scores.T.tolist(), strict=True)
    ranks = [[(spellings[one], score) for one, score in zip(*rank, strict=True)] for rank in pairs]
    return str(_MACROS.word_table(name, ranks))


def word_tables(look: Look) -> str:
    """Write the nearest words of each latent as tables."""
    nearest = _word_table("Nearest output vectors, with their cosine", look.nearest, look.spellings)
    return nearest + _word_table("What the head would emit, with its probability", look.lens, look.spellings)


def reading_table(questions: Mapping[str, Mapping[str, Reading]]) -> str:
    """Write accuracies, intervals and the commonest answer's accuracy as a table."""
    return str(_MACROS.reading_table(questions))


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """Put a page together.

    Args:
        introduction: HTML.
    """
    return str(_MACROS.page(title, introduction, sections)).lstrip()
