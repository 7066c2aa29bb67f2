"""Every page in a real browser, at the widths of a phone, a tablet and a desktop: nothing is cut off, broken or amiss.

    make test-browser

builds the site first; Chromium is the system's (tests/cluster/packages.txt).
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, Page, Request, sync_playwright
from support.pictures import noise
from support.records import write_jsonl
from support.studies import Scored, columns, contrast

from mirage_ds.cli import cli
from mirage_ds.study.report.build import write_report
from mirage_ds.study.results import Cell, Results, StageResult
from mirage_ds.study.spec import ReportSpec

pytestmark = pytest.mark.slow

SITE = Path(__file__).parents[2] / "site"
WIDTHS = (390, 834, 1440)
# What reaches beyond the window and is in no box of its own that can be scrolled; pictures that are not there.
LOOK = """() => {
  const width = document.documentElement.clientWidth, said = [];
  const boxed = (one) => {
    for (let box = one.parentElement; box && box !== document.body; box = box.parentElement)
      if (getComputedStyle(box).overflowX !== "visible") return true;
    return false;
  };
  if (document.documentElement.scrollWidth > width) said.push("the page scrolls sideways");
  for (const one of document.body.querySelectorAll("*")) {
    const place = one.getBoundingClientRect();
    if (place.width && place.height && place.right > width + 1 && !boxed(one))
      said.push(`${one.tagName} "${(one.textContent || "").trim().slice(0, 30)}" ends at ${Math.round(place.right)}`);
  }
  for (const one of document.images)
    if (!one.complete || !one.naturalWidth) said.push(`no picture ${one.src.slice(0, 80)}`);
  return said;
}"""
# Code that is wider than its box, though no line of it has more than 120 letters.
CUT = """() => [...document.querySelectorAll("pre > code")]
  .filter(one => one.scrollWidth > one.clientWidth + 1)
  .filter(one => one.textContent.split("\\n").every(line => line.length <= 120))
  .map(one => one.textContent.slice(0, 60))"""
LINKS = "() => [...document.querySelectorAll('a[href]')].map(one => one.href)"
ANCHORS = "() => [...document.querySelectorAll('[id]')].map(one => one.id)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "no chromium; make cluster-packages installs it"
    with sync_playwright() as playwright:
        # As root, which the tests are in a container, Chromium has no sandbox.
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


class Visitor:
    """Opens pages and notes what is wrong with them; `links` and `anchors` are of all pages seen, by address."""

    def __init__(self, browser: Browser):
        self.page: Page = browser.new_page()
        self.faults: list[str] = []
        self.links: dict[str, str] = {}
        self.anchors: dict[str, set[str]] = {}
        self.page.on("console", lambda said: self.note(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.note(str(error)))
        self.page.on("requestfailed", self.failed)
        self.page.on("response", lambda found: self.note(f"{found.status} {found.url}") if found.status > 399 else None)

    def note(self, what: str) -> None:
        self.faults.append(f"{unquote(urlsplit(self.page.url).path)}: {what}")

    def failed(self, request: Request) -> None:
        # What the browser itself gives up, since the page is left, is no fault.
        if request.failure != "net::ERR_ABORTED":
            self.note(f"no answer from {request.url}: {request.failure}")

    def visit(self, address: str) -> None:
        self.page.goto(address)
        # What slides into its place when the window changes is looked at when it is there.
        self.page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
        for width in WIDTHS:
            self.page.set_viewport_size({"width": width, "height": 900})
            for what in self.page.evaluate(LOOK):
                self.note(f"{width} px: {what}")
        for link in self.page.evaluate(LINKS):
            self.links.setdefault(link, address)
        self.anchors[address] = set(self.page.evaluate(ANCHORS))

    def dead(self) -> list[str]:
        """Links from a page to another one, or to a heading, that was not seen; other files are looked for by `get`."""
        found = []
        for link, page in self.links.items():
            address, _, anchor = link.partition("#")
            if urlsplit(address)[:2] != urlsplit(page)[:2]:
                continue
            known = self.anchors.get(address)
            if known is None and not self.page.request.get(address).ok:
                found.append(f"{page}: {link} is not there")
            elif known is not None and anchor and unquote(anchor) not in known:
                found.append(f"{page}: {link} has no such heading")
        return found


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def serve() -> Iterator[functools.partial[str]]:
    """Serve a folder: serve(folder) → its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield functools.partial(start)
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_site(browser: Browser, serve: functools.partial[str]) -> None:
    assert SITE.is_dir(), "no site/; make docs builds it"
    visitor, root = Visitor(browser), serve(SITE)
    # Files of the repository that pages link to lie beside the pages.
    pages = sorted(page for page in SITE.rglob("*.html") if page.name != "404.html")
    assert len(pages) > 30
    for page in pages:
        visitor.visit(root + page.relative_to(SITE).as_posix().removesuffix("index.html"))
        # The window is the widest now.
        for text in visitor.page.evaluate(CUT):
            visitor.note(f"code is cut off: {text}")
    assert [*visitor.faults, *visitor.dead()] == []


def test_output_has_no_button_to_copy_it_and_looks_different(browser: Browser, serve: functools.partial[str]) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{serve(SITE)}first_hour/")
    page.wait_for_selector(".language-sh .md-code__button")
    assert page.locator(".no-copy").count() >= 2
    assert page.locator(".no-copy .md-code__button").count() == 0
    ground = "one => getComputedStyle(one.querySelector('code')).backgroundColor"
    assert page.locator(".no-copy").first.evaluate(ground) != page.locator(".language-sh").first.evaluate(ground)


def study() -> Results:
    """Two arms, one of them with a long name, whose answers are long and have pictures."""
    name = "a_long_name[stage1.latent_size=4,stage1.compress_strategy=average,stage2.latent_size=8]"
    image = io.BytesIO()
    noise((320, 240), 3).save(image, "PNG")
    example = {"seed": 0, "evaluation": "test", "question": "Where? " * 30, "right": "x" * 200, "latents": 4}
    cells = [
        Cell(
            arm,
            seed,
            {"stage1.latent_size": k},
            [StageResult("s", f"{arm}{seed}", kind, 9, 9, 9, 9e9, 9.0, 1.0, 1.0, [{"step": 1, "loss": 2}])],
            {"test": columns([Scored(str(at), str(at % 3), {"success": float(at % k == seed)}) for at in range(24)])},
        )
        for arm, k, kind in (("text", 2, "sft"), (name, 3, "stage1"))
        for seed in (0, 1)
    ]
    return Results(
        "study",
        "Why? " * 30,
        {"text": "text alone", name: "other numbers of latents"},
        cells,
        ReportSpec(primary=contrast(name, "text", "test"), contrasts=[contrast("text", name, "test", ("1",))]),
        {"machine": "m" * 150},
        {"test": {str(at): float(at % 2) for at in range(24)}},
        [
            {**example, "arm": name, "line": at, "answer": "y " * 300, "score": 1.0 - at, "picture": picture}
            for at, picture in enumerate((image.getvalue(), None))
        ],
    )


def test_a_study_s_report(browser: Browser, tmp_path: Path) -> None:
    write_report(study(), tmp_path, 50)
    visitor = Visitor(browser)
    visitor.visit((tmp_path / "report.html").as_uri())
    assert visitor.faults == []
    top = "one => one.getBoundingClientRect().top"
    assert visitor.page.locator("img").first.evaluate(top) < visitor.page.locator("h2").first.evaluate(top)


def test_a_page_of_inspect(browser: Browser, nano: Path, tmp_path: Path) -> None:
    noise((168, 112), 1).save(tmp_path / "in.png")
    row = {"text_input": "<image>Where? " + "x" * 200, "text_output": "Up. " * 200, "image_input": "in.png"}
    file = write_jsonl(tmp_path / "rows.jsonl", [{**row, "image_output": "in.png"}] * 2)
    words = ["inspect", str(nano), "--data_path", str(file), "--latent_size", "8", "--out", str(tmp_path / "seen")]
    made = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    visitor = Visitor(browser)
    visitor.visit((tmp_path / "seen/index.html").as_uri())
    assert visitor.faults == []
    top = "one => one.getBoundingClientRect().top"
    assert visitor.page.locator("img").first.evaluate(top) < visitor.page.locator("dl").first.evaluate(top)


WRONG = {
    '<div style="width: 500px">wide</div>': "390 px: the page scrolls sideways",
    '<p style="white-space: nowrap">' + "long " * 200 + "</p>": "1440 px: the page scrolls sideways",
    '<div style="overflow: hidden"><img src="no.png"></div>': "no picture",
    "<script>console.error('amiss')</script>": "amiss",
    "<script>nothing.there()</script>": "nothing is not defined",
    '<a href="nowhere.html">x</a>': "nowhere.html is not there",
    '<a href="#there">x</a>': "#there has no such heading",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(browser: Browser, serve: functools.partial[str], tmp_path: Path, what: str) -> None:
    icon = '<link rel="icon" href="data:,">'
    (tmp_path / "page.html").write_text(f"<!doctype html><html><head>{icon}</head><body>{what}</body></html>")
    visitor = Visitor(browser)
    visitor.visit(f"{serve(tmp_path)}page.html")
    assert WRONG[what] in json.dumps([*visitor.faults, *visitor.dead()])
