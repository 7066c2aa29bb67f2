"""`mirage-ds data mix`: several records files as one, in given proportions."""

import random
from collections.abc import Sequence

from mirage_ds.config.mixture import Part, mixture_of, most, shares
from mirage_ds.curate.rewrite import Source
from mirage_ds.curate.spec import MixSpec
from mirage_ds.data.record import Record
from mirage_ds.errors import UserError
from mirage_ds.tasks.write import Row, Written, new_target, write_rows


def mix(parts: Sequence[Part], spec: MixSpec) -> list[Written]:
    """Write one records file of several: each row at most once, and the rows of one file in its order.

    With weights the files' shares of the rows are as these; without, as the files are long. With --rest the rows that
    are not taken are written too.

    Raises:
        UserError: weights for some files only, a file twice, too few rows in one, a faulty record, a target that
            exists.
    """
    targets = [spec, *([spec.model_copy(update={"out": spec.rest})] if spec.rest else [])]
    if len({new_target(one) for one in targets}) < len(targets):  # before the records are read
        raise UserError(f"--rest {spec.rest}: is --out too; name another folder")
    weighted = mixture_of(parts).weights or []
    sources = [Source.read(part.file, spec) for part in parts]
    counts = _counts(sources, weighted, spec.count)
    taken, left = [], []
    for at, source in enumerate(sources):
        # By chance, since levels may stand one after another; in their order.
        chosen = set(random.Random(f"{spec.seed}/mix/{at}").sample(range(len(source.records)), counts[at]))
        taken.append([record for place, record in enumerate(source.records) if place in chosen])
        left.append([record for place, record in enumerate(source.records) if place not in chosen])
    if spec.rest and not any(left):
        raise UserError(f"--rest {spec.rest}: every row is taken; give a --count below {sum(counts)}")
    rows = [_interleaved(sources, half, spec.seed) for half in (taken, left)[: len(targets)]]
    return [write_rows(own, one) for own, one in zip(rows, targets, strict=True)]


def _interleaved(sources: Sequence[Source], taken: Sequence[Sequence[Record]], seed: int) -> list[Row]:
    """Shuffle the files' rows into one another; those of one file keep their order."""
    turns = [at for at, own in enumerate(taken) for _ in own]
    random.Random(f"{seed}/mix/order").shuffle(turns)
    waiting = [iter(own) for own in taken]
    return [sources[at].row(next(waiting[at])) for at in turns]


def _counts(sources: Sequence[Source], weights: Sequence[float], count: int | None) -> list[int]:
    """Return how many rows each file gives."""
    files, lengths = [source.file for source in sources], [len(source.records) for source in sources]
    if count is None:
        return most(files, lengths, weights) if weights else lengths
    if not weights and count > (known := sum(lengths)):
        raise UserError(f"--count {count}: the files have {known} rows in all; ask for fewer or give more files")
    counts = shares(files, count, weights or lengths)
    for file, length, share in zip(files, lengths, counts, strict=True):
        if share > length:
            lacks = f"has {length} rows and would need {share} for its share of {count}"
            raise UserError(f"{file}: {lacks}; give it more rows, or lower its weight or --count")
    return counts
