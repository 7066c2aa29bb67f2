"""`mirage-ds data mix`: several records files as one, in given proportions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirage_ds.data.record import Record
from mirage_ds.data.rewrite import Row, Source, Written, write_rows
from mirage_ds.data.spec import MixSpec
from mirage_ds.errors import UserError, shown
from mirage_ds.tasks.supply import apportion
from mirage_ds.tasks.write import new_target


@dataclass(frozen=True)
class Part:
    """A file of a mixture, and its weight if it has one."""

    file: Path
    weight: float | None


def parse_part(text: str) -> Part:
    """Read FILE or FILE:WEIGHT; a file whose name ends like a weight is taken as it is called.

    Raises:
        UserError: the weight is not above 0, or out of all proportion.
    """
    name, colon, tail = text.rpartition(":")
    if not colon or not name or Path(text).exists():
        return Part(Path(text), None)
    try:
        weight = float(tail)
    except ValueError:
        return Part(Path(text), None)
    if not 1e-9 <= weight <= 1e9:
        raise UserError(f"{text}: the weight is {shown(tail)}; give a number from 1e-9 to 1e9")
    return Part(Path(name), weight)


def mix(parts: Sequence[Part], spec: MixSpec) -> Written:
    """Write one records file of several: each row at most once, and the rows of one file in its order.

    With weights the files' shares of the rows are as these; without, as the files are long.

    Raises:
        UserError: weights for some files only, a file twice, too few rows in one, a faulty record, a target that
            exists.
    """
    new_target(spec.out, spec.name)  # before the records are read
    weighted = [part.weight for part in parts if part.weight is not None]
    if weighted and len(weighted) != len(parts):
        bare = next(part.file for part in parts if part.weight is None)
        raise UserError(f"{bare} has no weight while other files have; give every file one as FILE:WEIGHT, or none")
    files = [part.file.resolve() for part in parts]
    for place, file in enumerate(files):
        if file in files[:place]:
            raise UserError(f"{parts[place].file} is named twice, and every row is taken at most once; name it once")
    sources = [Source.read(part.file, spec.image_root) for part in parts]
    counts = _counts(sources, weighted, spec.count)
    taken = [iter(_take(source, counts[at], spec.seed, at)) for at, source in enumerate(sources)]
    turns = [at for at, count in enumerate(counts) for _ in range(count)]
    random.Random(f"{spec.seed}/mix/order").shuffle(turns)
    return write_rows([_row(sources[at], next(taken[at])) for at in turns], spec)


def _counts(sources: Sequence[Source], weights: Sequence[float], count: int | None) -> list[int]:
    """Return how many rows each file gives."""
    lengths = [len(source.records) for source in sources]
    if not weights:
        if count is not None and count > sum(lengths):
            raise UserError(
                f"--count {count}: the files have {sum(lengths)} rows in all; ask for fewer or give more files"
            )
        return lengths if count is None else _shares(sources, count, lengths)
    if count is not None:
        counts = _shares(sources, count, weights)
        for source, length, share in zip(sources, lengths, counts, strict=True):
            if share > length:
                raise UserError(
                    f"{source.file}: has {length} rows and would need {share} for its share of {count}; give it more "
                    "rows, or lower its weight or --count"
                )
        return counts
    # As many as the file that is shortest for its share allows.
    most = min(length / weight for length, weight in zip(lengths, weights, strict=True)) * sum(weights)
    return _shares(sources, int(most + 1e-9), weights)


def _shares(sources: Sequence[Source], count: int, weights: Sequence[float]) -> list[int]:
    counts = apportion(count, weights)
    for source, share in zip(sources, counts, strict=True):
        if not share:
            raise UserError(f"{source.file}: gets no row in a mixture of {count}; raise its weight or --count")
    return counts


def _take(source: Source, count: int, seed: int, at: int) -> list[Record]:
    """Choose rows by chance, since levels may stand one after another, and keep their order."""
    chosen = random.Random(f"{seed}/mix/{at}").sample(range(len(source.records)), count)
    return [source.records[place] for place in sorted(chosen)]


def _row(source: Source, record: Record) -> Row:
    with source.told(record):
        return source.row(record)
