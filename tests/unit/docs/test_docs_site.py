"""The site, as far as it can be looked at without mkdocs: the hooks, the navigation, the pictures."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from matplotlib.patches import Rectangle
from PIL import Image

from mirage_ds.config.run import RunConfig
from mirage_ds.data.passes import schedule

ROOT = Path(__file__).parents[3]


def load_file(name: str) -> ModuleType:
    file = ROOT / "docs" / name
    spec = importlib.util.spec_from_file_location(f"docs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = load_file("site_files.py")
COMMANDS = load_file("commands.py")


@pytest.mark.parametrize(
    ("page", "link", "target"),
    [
        ("docs/data.md", "../data/README.md", "data/README.md"),
        ("docs/data.md", "../data", "data/README.md"),
        ("data/README.md", "../docs/data.md", "docs/data.md"),
        ("examples/7b/README.md", "../../ds_configs/README.md", "ds_configs/README.md"),
        ("docs/data.md", "../nowhere.md", None),
        ("docs/data.md", "../../etc/passwd", None),
        ("docs/data.md", "https://example.org/README.md", None),
    ],
)
def test_where_a_link_leads(page: str, link: str, target: str | None) -> None:
    assert HOOK.target_of(page, link) == target
    assert HOOK.in_repository(HOOK.site_place(page)) == page


@pytest.mark.parametrize(
    ("own", "written", "read"),
    [
        ("data.md", "[a](../data/README.md#keys) [b](tasks.md)", "[a](repo/data/README.md#keys) [b](tasks.md)"),
        ("repo/data/README.md", "[a](../docs/data.md)", "[a](../../data.md)"),
        ("repo/examples/7b/README.md", "![a](../../docs/scaling.png)", "![a](../../../scaling.png)"),
        ("data.md", "`[a](../data/README.md)`", "`[a](../data/README.md)`"),
        ("data.md", "```sh\n[a](../data/README.md)\n```", "```sh\n[a](../data/README.md)\n```"),
        # Output looks different and has no button to copy it.
        (
            "data.md",
            "```\nx\n```\n\n  ```text\n  y\n  ```",
            "``` { .text .no-copy }\nx\n```\n\n  ``` { .text .no-copy }\n  y\n  ```",
        ),
        ("data.md", "```console\n$ x\n```\n\n```sh\ny\n```", "``` { .console .no-copy }\n$ x\n```\n\n```sh\ny\n```"),
        ("data.md", "[a](../nowhere.md) [b](#here)", "[a](../nowhere.md) [b](#here)"),
        ("data.md", "| x | `<\\|a\\|>` |\nand `b\\|c`", "| x | `<|a|>` |\nand `b\\|c`"),
    ],
)
def test_links_on_the_site(own: str, written: str, read: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=own))
    files = SimpleNamespace(src_uris={"data.md", "tasks.md", "scaling.png", "repo/data/README.md"})
    assert HOOK.on_page_markdown(written, page=page, files=files) == read


def nav_of(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for below in part.values() if isinstance(part, dict) else part:
            yield from nav_of(below)


class Loader(yaml.SafeLoader):
    """Reads over mkdocs' own tags."""


Loader.add_multi_constructor("!!python", lambda *_: None)
Loader.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: None)


def test_the_navigation_names_every_page_and_only_pages() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    named = list(nav_of(config["nav"]))
    assert len(set(named)) == len(named)
    assert [one for one in named if not (ROOT / HOOK.in_repository(one)).is_file()] == []
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(named)


def test_the_page_of_commands_has_every_command_and_every_flag() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="commands.md"))
    source = (ROOT / "docs/commands.md").read_text()
    text = COMMANDS.on_page_markdown(source, page=page)
    titles = re.findall(r"^##+ `?([^`\n]+)`?$", text, re.M)
    assert len(set(titles)) == len(titles)
    assert {"Training", "mirage-ds evaluate", "mirage-ds ablate run", "mirage-ds data build vsp-transcription"} <= {
        *titles
    }
    assert all(f"`` --{name}" in text for name in RunConfig.model_fields)
    # Where training's flags are taken too, they are not told again.
    index = text.split("### `mirage-ds data index`")[1].split("\n##")[0]
    assert "[training](#training)" in index
    assert re.findall("^`` (--[a-z_]+)", index, re.M) == ["--config"]
    assert "\n:   \n" not in text
    other = SimpleNamespace(file=SimpleNamespace(src_uri="data.md"))
    assert COMMANDS.on_page_markdown(source, page=other) == source


def test_the_picture_of_the_passes_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_file("pictures/passes.py")
    monkeypatch.setattr(module, "OUT", tmp_path / "passes.png")
    module.main()
    with Image.open(tmp_path / "passes.png") as drawn, Image.open(ROOT / "docs/pictures/passes.png") as kept:
        assert drawn.size == kept.size


def test_the_front_page_s_passes_are_those_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs/pictures")
    module = load_file("pictures/landing.py")
    (axes,) = module.draw_passes().axes
    cells = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    run = [
        sum(patch.get_alpha() == 1 and round(patch.get_y() + 0.44) == at for patch in cells)
        for at in range(module.K + 1)
    ]
    length = len(module.BEFORE) + module.K + len(module.BEHIND)
    plans = schedule([length], [[(len(module.BEFORE), module.K)]], module.K + 1)
    assert run == [len(plan.tokens) for plan in plans]
