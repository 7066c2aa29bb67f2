"""Figures and tables → one HTML file that needs nothing beside it (page.html)."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

_ENVIRONMENT = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


def data_url(png: bytes) -> str:
    """Return a picture as a link that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


class Shown(NamedTuple):
    """A figure as it goes into the page: its link, what it shows for who does not see it, and how to read it."""

    url: str
    alt: str
    caption: str


class Section(NamedTuple):
    """One part of the page.

    Attributes:
        facts: names and texts, the texts as they are; readings: question → what is read → probe.Reading.
    """

    heading: str
    figures: Sequence[Shown] = ()
    facts: Sequence[tuple[str, str]] = ()
    text: str = ""
    readings: Mapping[str, Mapping[str, Any]] = {}


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """Put a page together.

    Args:
        introduction: HTML.
    """
    made = _ENVIRONMENT.get_template("page.html")
    return made.render(title=title, introduction=introduction, sections=sections).lstrip()
