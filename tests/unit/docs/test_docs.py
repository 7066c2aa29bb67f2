"""The pages: every relative link and anchor leads somewhere, every picture is there, every page is reached."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / name / "README.md" for name in ("data", "ds_configs", "launch")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("README.md"),
    ]
)
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`+[^`]*`+")
# [text](target) and ![text](target), also with a picture as the text; <img src="…">.
LINK = re.compile(r"\]\(\s*<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<img[^>]*\ssrc=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Text without fenced code; lines keep their numbers."""
    return FENCED.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())


def slug(title: str) -> str:
    """GitHub's name of a heading's anchor: lower case, letters, digits, `_` and `-`; a blank becomes a hyphen."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
    text = re.sub(r"[`*]|(?<!\w)_|_(?!\w)", "", text)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    found: set[str] = set()
    for title in HEADING.findall(prose(page)):
        first, number = slug(title), 0
        made = first
        while made in found:
            number += 1
            made = f"{first}-{number}"
        found.add(made)
    return found


def links(page: Path) -> list[tuple[int, str]]:
    """(line, target) of each link that stays inside the repository."""
    text = CODE.sub(lambda code: " " * len(code[0]), prose(page))
    found = [(text.count("\n", 0, link.start()) + 1, link[1] or link[2]) for link in LINK.finditer(text)]
    return [(line, target) for line, target in found if not re.match(r"[a-z]+:", target)]


def broken(page: Path) -> list[str]:
    """What is wrong with a page's links, a line each."""
    said = []
    for line, target in links(page):
        path, _, anchor = unquote(target).partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists():
            said.append(f"{page.name}:{line}: no {target}")
        elif anchor and (place.suffix != ".md" or anchor not in anchors(place)):
            said.append(f"{page.name}:{line}: no heading for #{anchor} in {place.name}")
    return said


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_every_page_of_docs_is_linked_from_another() -> None:
    linked = {(page.parent / unquote(target).split("#")[0]).resolve() for page in PAGES for _, target in links(page)}
    # The site's front page is reached by the site's address.
    lost = {page.name for page in (ROOT / "docs").glob("*.md")} - {page.name for page in linked} - {"index.md"}
    assert not lost


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("A run, from nothing to a trained model", "a-run-from-nothing-to-a-trained-model"),
        ("Before a GPU-hour is spent: `mirage-ds plan`", "before-a-gpu-hour-is-spent-mirage-ds-plan"),
        ("Where to look when you want to change …", "where-to-look-when-you-want-to-change-"),
        ("k = 4, 50 %", "k--4-50-"),
        ("What `--save_best` does", "what---save_best-does"),
        ("[data](data.md) and *more*", "data-and-more"),
    ],
)
def test_slugs_are_githubs(title: str, expected: str) -> None:
    assert slug(title) == expected


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One\n\n## Two `three`\n\n## One\n\n```sh\n# Four\n```\n")
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#two-three) [c](other.md#one-1) [d](#here) [e](https://x.y/z) `[f](no.md)`\n"
        '[g](othr.md)\n![h](no.png)\n[i](other.md#four)\n[j](#there)\n<img src="no.svg">\n'
    )
    assert broken(page) == [
        "page.md:3: no othr.md",
        "page.md:4: no no.png",
        "page.md:5: no heading for #four in other.md",
        "page.md:6: no heading for #there in page.md",
        "page.md:7: no no.svg",
    ]
