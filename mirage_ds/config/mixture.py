"""Several sources of records as one, each with a share of the rows or without: FILE:WEIGHT. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mirage_ds.errors import UserError, shown


class Part(NamedTuple):
    """A source of a mixture, and its weight if it has one."""

    file: Path
    weight: float | None


class Mixture(NamedTuple):
    """Sources as one."""

    parts: tuple[Part, ...]

    @property
    def weights(self) -> list[float] | None:
        """What the sources' shares of the rows are as; None where all rows are taken."""
        found = [part.weight for part in self.parts if part.weight is not None]
        return found or None

    def __str__(self) -> str:
        return " + ".join(str(part.file) for part in self.parts)


# What a function takes that reads records wherever they are.
Records = Path | Mixture


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


def mixture_of(parts: Sequence[Part]) -> Mixture:
    """Put sources together.

    Raises:
        UserError: weights for some of them only, or one that is named twice.
    """
    weighted = [part for part in parts if part.weight is not None]
    if weighted and len(weighted) != len(parts):
        bare = next(part.file for part in parts if part.weight is None)
        raise UserError(f"{bare} has no weight while other files have; give every file one as FILE:WEIGHT, or none")
    files = [part.file.resolve() for part in parts]
    for place, file in enumerate(files):
        if file in files[:place]:
            raise UserError(f"{parts[place].file} is named twice, and every row is taken at most once; name it once")
    return Mixture(tuple(parts))


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Split `total` by the shares into whole numbers that add up to it (largest remainders first)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def shares(files: Sequence[Path], count: int, weights: Sequence[float]) -> list[int]:
    """Split `count` rows by the weights.

    Raises:
        UserError: a source gets none.
    """
    counts = apportion(count, weights)
    for file, share in zip(files, counts, strict=True):
        if not share:
            raise UserError(f"{file}: gets no row in a mixture of {count}; raise its weight or --count")
    return counts


def most(files: Sequence[Path], lengths: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Count the rows of each source in the largest mixture of these weights that takes no row twice.

    Args:
        lengths: rows that there are of each.

    Raises:
        UserError: a source gets none.
    """
    total = min(length / weight for length, weight in zip(lengths, weights, strict=True)) * sum(weights)
    return shares(files, int(total + 1e-9), weights)


def records_of(named: Path | Sequence[Path]) -> Records:
    """Read what --data_path names: one source as it is called, or FILE[:WEIGHT] of each of several.

    Several stand in the order in which their records count, whatever order they were named in: a run's rows must not
    hang on that.

    Raises:
        UserError: see parse_part and mixture_of.
    """
    if isinstance(named, Path):
        return named
    return mixture_of(sorted((parse_part(str(one)) for one in named), key=lambda part: str(part.file)))
