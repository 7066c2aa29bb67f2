"""Figures and tables → one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from mirage_ds.analysis.inspect.look import Look
from mirage_ds.analysis.inspect.measure import Words
from mirage_ds.analysis.inspect.probe import Reading

_CSS = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1c1c; --quiet: #5c5c5c; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e6e6e6; --quiet: #a3a3a3; --line: #3c4046; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h2 { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; }
p, figcaption, dt { max-width: 52rem; }
figcaption, dt, .quiet { color: var(--quiet); font-size: .9rem; }
figure { margin: 1.2rem 0; overflow-x: auto; }
img { background: #fff; border-radius: 6px; }
pre { white-space: pre-wrap; margin: 0; font-size: .85rem; }
dd { margin: 0 0 .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 1rem; }
td, th { border-bottom: 1px solid var(--line); padding: .15rem .7rem .15rem 0; text-align: left; }
td small { color: var(--quiet); }
"""


class Shown(NamedTuple):
    """A figure as it goes into the page: PNG bytes, what it shows for who does not see it, and how to read it."""

    png: bytes
    alt: str
    caption: str


class Section(NamedTuple):
    """One part of the page: its heading, HTML in front of the figures, and the figures."""

    heading: str
    html: str
    figures: list[Shown]


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Write names and texts, the texts as they are."""
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd><pre>{escape(t)}</pre></dd>" for n, t in pairs) + "</dl>"


def paragraph(text: str) -> str:
    """Write one paragraph."""
    return f"<p>{escape(text)}</p>"


def _words(name: str, words: Words, spellings: dict[int, str]) -> str:
    head = "".join(f"<th>latent {number + 1}</th>" for number in range(len(words.ids)))
    rows = ""
    for ids, scores in zip(words.ids.T.tolist(), words.scores.T.tolist(), strict=True):
        cells = (f"{escape(spellings[one])} <small>{score:.2f}</small>" for one, score in zip(ids, scores, strict=True))
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f'<p class="quiet">{escape(name)}</p><table><tr>{head}</tr>{rows}</table>'


def word_tables(look: Look) -> str:
    """Write the nearest words of each latent as tables."""
    nearest = _words("Nearest output vectors, with their cosine", look.nearest, look.spellings)
    return nearest + _words("What the head would emit, with its probability", look.lens, look.spellings)


def reading_table(questions: dict[str, dict[str, Reading]]) -> str:
    """Write accuracies, intervals and the commonest answer's accuracy as a table."""
    rows = "".join(
        f"<tr><td>{escape(question)}</td><td>{escape(source)}</td><td>{100 * r.accuracy:.1f} %</td>"
        f"<td>{100 * r.low:.1f}–{100 * r.high:.1f} %</td><td>{100 * r.chance:.1f} %</td></tr>"
        for question, found in questions.items()
        for source, r in found.items()
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("question", "read from", "accuracy", "95 % interval", "commonest answer")
    )
    return f"<details><summary>The numbers</summary><table><tr>{head}</tr>{rows}</table></details>"


def _figure(shown: Shown) -> str:
    data = base64.b64encode(shown.png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(shown.alt)}">'
        f"<figcaption>{escape(shown.caption)}</figcaption></figure>"
    )


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """Put a page together.

    Args:
        introduction: HTML.
    """
    body = "".join(
        f"<h2>{escape(part.heading)}</h2>{part.html}{''.join(map(_figure, part.figures))}" for part in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_CSS}</style></head><body><h1>{escape(title)}</h1>{introduction}{body}</body></html>\n"
    )
