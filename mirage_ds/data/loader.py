"""Rows to micro-batches: plan each step, fill and collate its rows in worker processes.

W ranks, G micro-steps of a step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice

import torch

from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.encode import Encoder, beside_each
from mirage_ds.data.features import FeatureStore, KeptFeatures
from mirage_ds.data.index import Index
from mirage_ds.data.pack import Bins, Planner, StepPlan
from mirage_ds.data.record import Record, RecordError, blamed
from mirage_ds.data.sample import Measure, Sample
from mirage_ds.data.ship import Shipment, from_workers, ship
from mirage_ds.errors import UserError


def check_records(records: Sequence[Record], encoder: Encoder) -> list[Measure]:
    """Measure every record and decode every image; for what is decoded, not trained on.

    Raises:
        UserError: the first record that cannot be used.
    """

    def check(record: Record) -> Measure:
        measure = encoder.measure(record)
        for name, path in record.images(helpers=encoder.helped):
            encoder.finder.check(record, name, path)
        return measure

    with ThreadPoolExecutor() as pool, blamed("record on "):
        return list(pool.map(check, records))


class Rows:
    """Fills a row when it is asked for.

    Args:
        records: the rows on disk.
        stores: field name → the kept features of its images.
    """

    def __init__(self, records: Index, encoder: Encoder, stores: Mapping[str, FeatureStore]):
        self.records = records
        self.encoder = encoder
        self.stores = stores
        self.encoders = beside_each(encoder, records.files, records.pictures)

    def __getitem__(self, row: int) -> Sample:
        """Return a row's Sample.

        Raises:
            UserError: one of its images is faulty, or what the cache holds of it is damaged; only this process knows.
        """
        record, layout = self.records.encoded(row)
        try:
            kept = {name: KeptFeatures(self.records.images[name], self.stores[name]).of(row) for name in self.stores}
            images, helpers = kept.get("image_input"), kept.get("image_output")
            return self.encoders[int(self.records["file"][row])].fill(layout, record, row, images, helpers)
        except RecordError as error:
            raise UserError(f"record on {self.records.named(error.fault, row)}", everywhere=False) from None

    def batch(self, work: tuple[Sequence[int], int], passes: Callable[[int], int]) -> Shipment:
        """Return a micro-batch, to be sent; UserError as for one row.

        Args:
            work: its rows, and the latent blocks that the micro-step goes through.
        """
        (rows, runs), encoder = work, self.encoder
        dummy = encoder.dummy(max(runs, 1) if encoder.auxiliary else runs if passes(runs) > 1 else 0)
        samples = [self[row] for row in rows]
        return ship(collate(samples, passes(runs), dummy, encoder.auxiliary, encoder.latent_passes))


class Loader:
    """One rank's micro-batches, step by step.

    Args:
        records: the rows on disk.
        planner: says which rows run where.
        rank: this rank.
        passes: latent blocks of the row that has most in a micro-step, over all ranks → the passes of its
            micro-batches (RunConfig.passes): ranks that differ in them hang ZeRO-3.
        workers: worker processes.
        kept: field name → the kept features of its images.
    """

    def __init__(
        self,
        records: Index,
        encoder: Encoder,
        planner: Planner,
        rank: int,
        passes: Callable[[int], int],
        workers: int,
        kept: Mapping[str, KeptFeatures] | None = None,
    ):
        # Which images a row has the records say themselves, so that a worker needs no table of them.
        self.rows = Rows(records, encoder, {name: one.store for name, one in (kept or {}).items()})
        self.planner = planner
        self.rank = rank
        self.workers = workers
        self.batch = partial(self.rows.batch, passes=passes)

    def steps(self, start: int, stop: int) -> Iterator[tuple[StepPlan, Iterator[Batch]]]:
        """Yield (plan, its G micro-batches of this rank) for the steps start … stop − 1."""
        batches = self.batches(micro for step in range(start, stop) for micro in self.planner.plan(step).bins)
        for step in range(start, stop):
            plan = self.planner.plan(step)
            yield plan, islice(batches, plan.micro_steps)

    def batches(self, bins: Iterable[Bins]) -> Iterator[Batch]:
        """Yield this rank's micro-batch of each micro-step, of which `bins` has the rows of every rank.

        Raises:
            UserError: a row cannot be filled; only this rank knows.
        """
        runs = self.rows.records["runs"]
        work = ((micro[self.rank], int(runs[list(chain(*micro))].max(initial=0))) for micro in bins)
        for shipment in from_workers(self.batch, work, self.workers, 4, torch.cuda.is_available()):
            yield shipment.unpack()
