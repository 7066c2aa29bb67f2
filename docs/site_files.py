"""mkdocs hook: files outside docs/ that a page links to join the site under repo/, and relative links lead to them.

A page keeps the links that work where the code lies: `../data/README.md` from docs/ becomes `repo/data/README.md` on
the site, and `../docs/data.md` from there becomes `../../data.md`. A link to a file that is not there stays as it
is, and `mkdocs build --strict` says so.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Code, in which nothing is a link, or a link: ](target).
PIECE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)|(\]\()([^()\s#]+)(#[^()\s]*)?\)", re.DOTALL | re.MULTILINE)
# The first line of a block that shows output.
OUTPUT = re.compile(r"\A( *```)(|text|console)$", re.MULTILINE)


def site_place(place: str) -> str:
    """Where a file lies in the site's sources; `place` is from the repository's root."""
    return place.removeprefix("docs/") if place.startswith("docs/") else f"repo/{place}"


def in_repository(source: str) -> str:
    """The reverse of `site_place`."""
    return source.removeprefix("repo/") if source.startswith("repo/") else f"docs/{source}"


def target_of(page: str, link: str) -> str | None:
    """The file of the repository that a link on a page leads to, from the root; a folder's is its README.md."""
    if re.match(r"[a-z]+:", link):
        return None
    place = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / place).is_dir():
        place = posixpath.join(place, "README.md")
    return place if not place.startswith("..") and (ROOT / place).is_file() else None


def on_files(files: Any, config: Any) -> Any:
    """Take in what the pages link to, and what the pages link to that so came in."""
    from mkdocs.structure.files import File

    waiting = [file for file in files if file.is_documentation_page()]
    for page in waiting:
        for link in PIECE.finditer(page.content_string):
            target = target_of(in_repository(page.src_uri), link[3]) if link[3] else None
            if target is None or site_place(target) in files.src_uris:
                continue
            made = File.generated(config, site_place(target), abs_src_path=str(ROOT / target))
            files.append(made)
            if made.is_documentation_page():
                waiting.append(made)
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Turn relative links into those of the site's sources.

    In a table's code a code host wants `\\|` for a bar, and the site shows the backslash: it goes.
    """
    own = page.file.src_uri

    def turn(link: re.Match[str]) -> str:
        begin = link.string.rfind("\n", 0, link.start()) + 1
        if link[1] and link.string[begin] == "|":
            return link[1].replace("\\|", "|")
        if link[1]:
            return OUTPUT.sub(lambda met: f"{met[1]} {{ .{met[2] or 'text'} .no-copy }}", link[1])
        target = target_of(in_repository(own), link[3]) if link[3] else None
        if target is None or site_place(target) not in files.src_uris:
            return link[0]
        return f"]({posixpath.relpath(site_place(target), posixpath.dirname(own) or '.')}{link[4] or ''})"

    return PIECE.sub(turn, markdown)
