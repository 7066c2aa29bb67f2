"""What other trainers call our settings (names.yaml): for wrong flags, and for `mirage-ds config import`."""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mirage_ds.errors import closest


@cache
def tables() -> dict[str, Any]:
    """Read names.yaml, once somebody asks."""
    return yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))


@cache
def by_theirs(table: str) -> dict[str, str]:
    """Return a table of names the other way round: theirs → our setting ("ours"), or the reason ("absent")."""
    return {theirs: one for one, names in tables()[table].items() for theirs in names}


def ours(name: str) -> str | None:
    """Return our setting for another trainer's, or None; `-` and `_` are alike."""
    return by_theirs("ours").get(_key(name))


def hint(name: str, known: Collection[str]) -> str:
    """Return what to say behind an unknown setting: its name here, why there is none, or the nearest known name.

    Args:
        name: as it was given: a flag with its dashes, or a key.
        known: the settings that there are.
    """
    theirs, found = _key(name), ours(name)
    dashes = "--" if name.startswith("-") else ""
    if found and found in known:
        differs = tables()["differs"].get(theirs)
        return f"; here it is {dashes}{found}{f' ({differs})' if differs else ''}"
    if theirs in by_theirs("absent"):
        return f"; it has no counterpart here: {by_theirs('absent')[theirs]}"
    return closest(name, [dashes + one for one in known])


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
