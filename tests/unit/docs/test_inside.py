"""The way of a row in docs/inside.md: its names exist, it is short, and no file imports one that comes later."""

from __future__ import annotations

import importlib
import itertools
import re
from functools import reduce
from pathlib import Path

import grimp

PAGE = Path(__file__).parents[3] / "docs" / "inside.md"
MOST_HOPS = 20


def parts() -> list[list[tuple[str, str]]]:
    """(module, name in it) of each hop, part by part."""
    found = re.search(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    ways = []
    for part in found[1].strip().split("\n\n"):
        hops = [line.split()[0] for line in part.splitlines()[1:]]
        ways.append([(".".join(hop.split(".")[:2]), ".".join(hop.split(".")[2:])) for hop in hops])
    return ways


def test_every_name_of_the_way_is_a_function_or_a_class() -> None:
    hops = [hop for part in parts() for hop in part]
    assert 10 < len(hops) <= MOST_HOPS
    for module, name in hops:
        assert callable(reduce(getattr, name.split("."), importlib.import_module(f"mirage_ds.{module}")))


def test_the_way_never_turns_back() -> None:
    graph = grimp.build_graph("mirage_ds")
    for part in parts():
        modules = [f"mirage_ds.{module}" for module, _ in itertools.groupby(part, key=lambda hop: hop[0])]
        # A part comes to each file once.
        assert len(set(modules)) == len(modules)
        for earlier, later in itertools.combinations(modules, 2):
            assert graph.find_shortest_chain(earlier, later) is None, (earlier, later)
