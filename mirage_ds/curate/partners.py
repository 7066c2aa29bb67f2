"""Whose helper each record gets instead of its own: another one of its level, each helper once."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from mirage_ds.curate.rewrite import Source
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError


def derange(labels: Sequence[Hashable], rng: random.Random) -> list[int] | None:
    """Draw a permutation that gives no place a label like its own.

    All labels different, it is a random cycle. Otherwise equal labels stand side by side in an order of chance, which
    is turned by as many places as the commonest label has.

    Returns:
        For each place the place it gets; None where more than half of the labels are equal, so that there is none.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place in rng.sample(range(len(labels)), len(labels)):
        members[labels[place]].append(place)
    order = [place for places in members.values() for place in places]
    turn = max(map(len, members.values()), default=0)
    if 2 * turn > len(order):
        return None
    return [other for _, other in sorted(zip(order, order[turn:] + order[:turn], strict=True))]


def choose_partners(source: Source, seed: int) -> list[int]:
    """Choose for each record another one of its level with as many helpers, and with another content in them.

    Raises:
        UserError: a record without a level, or a level that has no partner for each of its records.
    """
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    contents: list[tuple[bytes, ...]] = []
    for place, record in enumerate(source.records):
        with source.told(record):
            groups[_level(record), len(record.image_output)].append(place)
            contents.append(_content(source, record))
    found = [0] * len(source.records)
    for (level, helpers), places in sorted(groups.items()):
        own = [contents[place] for place in places]
        chosen = derange(own, random.Random(f"{seed}/swap/{level}/{helpers}"))
        if chosen is None:
            what = f"level {level}" + (f" with {helpers} helpers" if helpers > 1 else "")
            if len(places) == 1:
                trouble = f"the record on line {source.records[places[0]].line} is the only one of {what}"
            else:
                trouble = f"{max(Counter(own).values())} of the {len(places)} records of {what} have one helper"
            raise UserError(
                f"{source.file}: helper-swap: {trouble}, so there is no other for each; give more records of that "
                "level, or leave it out"
            )
        for place, other in zip(places, chosen, strict=True):
            found[place] = places[other]
    return found


def _level(record: Record) -> str:
    """Return what a record calls its level, else the side of its map."""
    board = record.extra.get("map_desc")
    if "level" not in record.extra and not isinstance(board, list):
        raise record.fault("level", "missing, and there is no map_desc", "add it: a helper is swapped within its level")
    return str(record.extra.get("level", len(board) if isinstance(board, list) else None))


def _content(source: Source, record: Record) -> tuple[bytes, ...]:
    """Return the hashes of a record's helpers: pictures of one content are no swap, whatever they are called."""
    found = []
    for path in record.image_output:
        place = source.finder.find(record, "image_output", path)
        try:
            with place.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise record.fault(
                "image_output", f"{place} cannot be read ({error.strerror})", "make it readable"
            ) from None
    return tuple(found)
