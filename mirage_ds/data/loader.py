"""Rows to micro-batches: open the rows' index, plan each step, fill and collate in worker processes.

R usable rows, W ranks, G micro-steps of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mirage_ds.config.mixture import Mixture, Records
from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.features import FeatureStore, ImageKeys, KeptFeatures
from mirage_ds.data.index import BesideEach, EncodedRows
from mirage_ds.data.indexing import open_index
from mirage_ds.data.pack import Planner, StepPlan
from mirage_ds.data.record import Fault, Record, RecordError
from mirage_ds.data.sample import Measure, Sample
from mirage_ds.data.ship import Shipment, ignore_in_worker, ship
from mirage_ds.errors import UserError

# A share of dropped rows above this is worth a line in the log; --max_dropped_share decides when it is an error.
WARN_DROPPED_SHARE = 0.01


class Index(NamedTuple):
    """The usable rows of a dataset, measured.

    Attributes:
        row_ids: (R,) place of each usable row in the dataset.
        tokens, labels, runs: (R,) counts of each.
        patches: (R,) vision patches of its images: of the input images and, in stage1, of the helpers.
        dropped: rows longer than the limit; longest: tokens of the longest row met.
        images: field name → the images of all rows, usable or not, for the fields whose features are kept.
        records: how many the source holds, usable or not.
        skipped: one fault of each record that is left out for it.
        rows: all rows as they are on disk.
    """

    row_ids: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    runs: np.ndarray
    dropped: int
    longest: int
    images: dict[str, ImageKeys]
    records: int
    skipped: tuple[Fault, ...]
    patches: np.ndarray
    rows: EncodedRows

    @property
    def dropped_share(self) -> float:
        """Share of the records that are too long."""
        return self.dropped / max(1, self.dropped + len(self.row_ids))


def check_records(records: list[Record], encoder: Encoder) -> tuple[dict[int, Fault], list[Measure]]:
    """Measure every record of a list and decode every image once; for what is decoded, not trained on.

    Returns:
        Place in `records` → its fault, and the measure of each record (empty for a faulty one).
    """
    faults: dict[int, Fault] = {}
    nothing = Measure(0, 0, 0, (), ())
    measures = [nothing] * len(records)
    for i, record in enumerate(records):
        try:
            measures[i] = encoder.measure(record)
        except RecordError as error:
            faults[i] = error.fault

    users: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        if i not in faults:
            for name, path in record.images(helpers=encoder.stage == "stage1"):
                users[name, path].append(i)

    def decode(item: tuple[tuple[str, str], list[int]]) -> tuple[list[int], Fault | None]:
        (name, path), rows = item
        try:
            encoder.finder.load(records[rows[0]], name, path)
        except RecordError as error:
            return rows, error.fault
        return rows, None

    with ThreadPoolExecutor() as pool:
        for rows, fault in pool.map(decode, users.items()):
            if fault:
                faults |= {i: replace(fault, line=records[i].line) for i in rows if i not in faults}
    for i in faults:
        measures[i] = nothing
    return faults, measures


class Broken(NamedTuple):
    """Rows that turned out faulty after they were indexed.

    Attributes:
        rows: (B,) dataset rows, in order; which: (B,) the number of its fault in `faults`.
        faults: of images; each is of the first record that was seen to have it.
    """

    rows: np.ndarray
    which: np.ndarray
    faults: tuple[Fault, ...]

    @classmethod
    def none(cls) -> Broken:
        """Make the one of no rows."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), ())

    def and_also(self, other: Broken) -> Broken:
        """Join two; a row in both keeps the first one's fault."""
        new = ~np.isin(other.rows, self.rows)
        rows = np.concatenate([self.rows, other.rows[new]])
        which = np.concatenate([self.which, other.which[new] + len(self.faults)])
        order = np.argsort(rows)
        return Broken(rows[order], which[order], (*self.faults, *other.faults))

    def of_rows(self, rows: EncodedRows) -> Iterator[Fault]:
        """Yield the fault of each row, at its own line."""
        lines = rows["line"]
        for row, number in zip(self.rows.tolist(), self.which.tolist(), strict=True):
            fault = self.faults[number]
            own = rows.named(replace(fault, line=int(lines[row])), row)
            same = (own.file, own.line) == (fault.file, fault.line)
            yield fault if same else replace(own, what=f"as on {fault.place}: {fault.what}")


def by_place(fault: Fault) -> tuple[str, int]:
    """Sort faults in the order of their records."""
    return fault.file, fault.line


def _lists(data_path: Records) -> str:
    """Say what lists the faults of the records."""
    files = [part.file for part in data_path.parts] if isinstance(data_path, Mixture) else [data_path]
    commands = " and ".join(f"`mirage-ds data check {file}`" for file in files)
    return f"{commands} {'lists' if len(files) == 1 else 'list'} them"


def faults_error(data_path: Records, first: Fault, count: int) -> UserError:
    """Make the error that says the first fault of the records and counts the others."""
    rest = f" (and {count - 1} more: {_lists(data_path)})" if count > 1 else ""
    return UserError(f"{data_path}: {first}{rest}")


def judge_faults(data_path: Records, first: Fault, count: int, records: int, max_bad_share: float | None) -> None:
    """Decide whether the other records may be trained on.

    Args:
        first: the first fault; count: how many records have one.
        max_bad_share: share of faulty records that is left out; None where one fault refuses the records.

    Raises:
        UserError: they may not.
    """
    if max_bad_share is None:
        raise faults_error(data_path, first, count)
    if count > max_bad_share * records:
        raise UserError(
            f"{data_path}: {count} of {records} records have a fault, above --max_bad_share {max_bad_share}; the "
            f"first is {first} ({_lists(data_path)})"
        )


def without(index: Index, broken: Broken, data_path: Records, max_bad_share: float) -> Index:
    """Leave out rows that turned out faulty after they were measured.

    Raises:
        UserError: too large a share is faulty now, or no row is left.
    """
    if not len(broken.rows):
        return index
    first = min([*index.skipped[:1], next(broken.of_rows(index.rows))], key=by_place)
    judge_faults(data_path, first, len(index.skipped) + len(broken.rows), index.records, max_bad_share)
    skipped = tuple(sorted([*index.skipped, *broken.of_rows(index.rows)], key=by_place))
    stays = ~np.isin(index.row_ids, broken.rows)
    if not stays.any():
        raise no_row_left(data_path, skipped[0], len(skipped))
    rows = {name: getattr(index, name)[stays] for name in ("row_ids", "tokens", "labels", "runs", "patches")}
    return index._replace(skipped=skipped, **rows)


def no_row_left(data_path: Records, first: Fault, count: int) -> UserError:
    """Make the error of records of which faults leave no row."""
    return UserError(f"{data_path}: no usable row: {count} record(s) have a fault, the first is {first}")


def usable(
    rows: EncodedRows,
    data_path: Records,
    max_length: int,
    max_dropped_share: float,
    keep: Sequence[str] = (),
    max_bad_share: float | None = None,
) -> Index:
    """Choose the rows that can be trained on.

    Args:
        keep: fields whose features are kept.
        max_bad_share: see judge_faults.

    Raises:
        UserError: a record has a fault (with max_bad_share: too large a share of them), too large a share is too long,
            or no row is left.
    """
    if rows.faults:
        first = next(rows.all_faults())
        judge_faults(data_path, first, rows.faults, rows.records, max_bad_share)
        if rows.faults == rows.records:
            raise no_row_left(data_path, first, rows.faults)
    tokens = rows["tokens"]
    # A row with a fault has none.
    sound = int(np.count_nonzero(tokens))
    fits = np.flatnonzero((tokens > 0) & (tokens <= max_length))
    index = Index(
        row_ids=fits,
        **{name: rows[name][fits] for name in ("tokens", "labels", "runs", "patches")},
        dropped=sound - len(fits),
        longest=int(tokens.max()),
        images={name: rows.images(name) for name in keep},
        records=rows.records,
        skipped=tuple(rows.all_faults()),
        rows=rows,
    )
    if not len(fits):
        raise UserError(
            f"{data_path}: no usable row: all {index.dropped} are longer than --max_length {max_length} "
            f"(the longest has {index.longest} tokens); raise it or lower --max_pixels"
        )
    if index.dropped_share > max_dropped_share:
        raise UserError(
            f"{data_path}: {index.dropped} of {sound} rows are longer than --max_length {max_length} (the "
            f"longest has {index.longest} tokens), above --max_dropped_share {max_dropped_share}; raise one of them"
        )
    return index


def build_index(
    data_path: Records,
    encoder: Encoder,
    max_length: int,
    max_dropped_share: float,
    keep: Sequence[str] = (),
    quiet: bool = True,
    max_bad_share: float | None = None,
    cache_dir: Path | None = None,
) -> Index:
    """Open the index of the records, made first where there is none, and choose the rows that can be trained on.

    Args:
        keep: fields ("image_input", "image_output") whose features are kept: their images get keys here and are decoded
            by whoever makes the features.
        max_bad_share: see judge_faults.
        cache_dir: holds the index; ~/.cache/mirage_ds if None.

    Raises:
        UserError: see indexing.open_index and `usable`.
    """
    rows = open_index(data_path, encoder, keep, cache_dir, quiet)
    return usable(rows, data_path, max_length, max_dropped_share, keep, max_bad_share)


class Rows(torch.utils.data.Dataset):
    """Fills a row when it is asked for; a faulty one arrives as its Fault, since a worker's exception loses it.

    Args:
        records: the rows on disk.
        stores: field name → the kept features of its images.
    """

    def __init__(self, records: EncodedRows, encoder: Encoder, stores: Mapping[str, FeatureStore]):
        self.records = records
        self.encoder = encoder
        self.stores = stores
        self.encoders = BesideEach(encoder, records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Sample | Fault:
        """Return a row's Sample, or its Fault.

        Raises:
            UserError: what the cache holds of it is damaged.
        """
        record, layout = self.records.encoded(row)
        try:
            features = {
                name: KeptFeatures(self.records.images(name), store).of(row) for name, store in self.stores.items()
            }
            images, helpers = features.get("image_input"), features.get("image_output")
            return self.encoders[row].fill(layout, record, row, images, helpers)
        except RecordError as error:
            return self.records.named(error.fault, row)

    def __getitems__(self, rows: Sequence[int]) -> list[Sample | Fault | UserError]:
        """Return several rows; an error that is no record's is the only item."""
        try:
            return [self[row] for row in rows]
        except UserError as error:
            return [error]


def _collate(
    items: list[Sample | Fault | UserError], make: Callable[[list[Sample]], Batch]
) -> Shipment | Fault | UserError:
    for item in items:
        if isinstance(item, (Fault, UserError)):
            return item
    return ship(make([item for item in items if isinstance(item, Sample)]))


class Loader:
    """One rank's micro-batches, step by step.

    Args:
        records: the rows on disk.
        planner: says which rows run where.
        rank: this rank.
        passes: passes of every micro-batch (see pack.schedule).
        workers: worker processes.
        kept: field name → the kept features of its images.
    """

    def __init__(
        self,
        records: EncodedRows,
        encoder: Encoder,
        planner: Planner,
        rank: int,
        passes: int,
        workers: int,
        kept: Mapping[str, KeptFeatures] | None = None,
    ):
        # Which images a row has the records say themselves, so that a worker needs no table of them.
        self.rows = Rows(records, encoder, {name: one.store for name, one in (kept or {}).items()})
        self.planner = planner
        self.rank = rank
        self.workers = workers
        dummy = encoder.dummy(1 if encoder.auxiliary else (passes - 1) // encoder.latent_size)
        make = partial(collate, passes=passes, dummy=dummy, auxiliary=encoder.auxiliary)
        self.collate = partial(_collate, make=make)

    def steps(self, start: int, stop: int) -> Iterator[tuple[StepPlan, Iterator[Batch]]]:
        """Yield (plan, its G micro-batches of this rank) for the steps start … stop − 1."""
        batches = self.batches(
            micro[self.rank] for step in range(start, stop) for micro in self.planner.plan(step).bins
        )
        for step in range(start, stop):
            plan = self.planner.plan(step)
            yield plan, islice(batches, plan.micro_steps)

    def batches(self, bins: Iterable[list[int]]) -> Iterator[Batch]:
        """Yield one micro-batch per bin of rows.

        Raises:
            UserError: a row cannot be filled; only this rank knows.
        """
        loader = torch.utils.data.DataLoader(
            self.rows,
            batch_sampler=bins,
            collate_fn=self.collate,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_in_worker,
        )
        for item in loader:
            if isinstance(item, UserError):
                raise item
            if isinstance(item, Fault):
                raise UserError(f"record on {item}", everywhere=False)
            yield item.unpack()
