"""The notebook runs from top to bottom, in a real kernel where there is one, and ends as its stored outputs say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

BOOK = Path(__file__).parents[2] / "examples/python.ipynb"


def in_a_kernel() -> str:
    import nbformat
    from nbclient import NotebookClient

    done = NotebookClient(nbformat.read(BOOK, as_version=4), timeout=600).execute()
    outputs = [one for cell in done["cells"] if cell["cell_type"] == "code" for one in cell["outputs"]]
    return "".join(one["text"] for one in outputs if one.get("name") == "stdout")


def in_this_process(book: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    space: dict[str, Any] = {"display": lambda *_: None}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), BOOK.name, "exec"), space)
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_is_a_first_hour_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    book = json.loads(BOOK.read_text(encoding="utf-8"))
    kernel = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))
    said = in_a_kernel() if kernel else in_this_process(book, capsys)
    shown = "".join(text for cell in book["cells"] for one in cell.get("outputs", []) for text in one.get("text", []))
    # Numbers differ with torch's version; what is said does not.
    words = [re.sub(r"[^a-z ]|red|green|blue|orange", "", text).split() for text in (said, shown)]
    assert words[0] == words[1]
    share, constant = map(float, re.search(r"right: (.*); always the commonest answer: (.*)", said).groups())
    assert share > 0.8 > 2 * constant
