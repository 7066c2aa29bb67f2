"""Rows to micro-batches: plan each step, fill and collate its rows in worker processes.

W ranks, G micro-steps of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.encode import BesideEach, Encoder
from mirage_ds.data.features import FeatureStore, KeptFeatures
from mirage_ds.data.images import RememberingFinder
from mirage_ds.data.index import Index
from mirage_ds.data.pack import Planner, StepPlan
from mirage_ds.data.record import Fault, Record, RecordError
from mirage_ds.data.sample import NO_MEASURE, Measure, Sample
from mirage_ds.data.ship import Shipment, ignore_in_worker, ship
from mirage_ds.errors import UserError


def check_records(records: list[Record], encoder: Encoder) -> tuple[dict[int, Fault], list[Measure]]:
    """Measure every record of a list and decode every image; for what is decoded, not trained on.

    Returns:
        Place in `records` → its fault, and the measure of each record (empty for a faulty one).
    """
    own = replace(encoder, finder=RememberingFinder(encoder.finder.folders, encoder.finder.within))

    def check(record: Record) -> Measure | Fault:
        try:
            measure = own.measure(record)
            for name, path in record.images(helpers=encoder.stage == "stage1"):
                own.finder.check(record, name, path)
        except RecordError as error:
            return error.fault
        return measure

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(check, records))
    faults = {place: one for place, one in enumerate(found) if isinstance(one, Fault)}
    return faults, [NO_MEASURE if isinstance(one, Fault) else one for one in found]


class Rows(torch.utils.data.Dataset):
    """Fills a row when it is asked for; a faulty one arrives as its Fault, since a worker's exception loses it.

    Args:
        records: the rows on disk.
        stores: field name → the kept features of its images.
    """

    def __init__(self, records: Index, encoder: Encoder, stores: Mapping[str, FeatureStore]):
        self.records = records
        self.encoder = encoder
        self.stores = stores
        self.encoders = BesideEach(encoder, records.files, records.pictures)

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
            return self.encoders[int(self.records["file"][row])].fill(layout, record, row, images, helpers)
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
        records: Index,
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
