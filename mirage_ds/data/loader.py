"""Rows to micro-batches: measure the rows once, plan each step, encode and collate in worker processes.

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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from rich.progress import track

from mirage_ds.data.batch import Batch, collate
from mirage_ds.data.encode import Encoder, Measure, Sample
from mirage_ds.data.features import ImageKeys, KeptFeatures, Key, image_key, image_keys
from mirage_ds.data.pack import Planner, StepPlan
from mirage_ds.data.record import Fault, Record, RecordError, record_of, scan
from mirage_ds.errors import UserError
from mirage_ds.stop import ignore_in_worker

if TYPE_CHECKING:
    from datasets import Dataset

# A share of dropped rows above this is worth a line in the log; --max_dropped_share decides when it is an error.
WARN_DROPPED_SHARE = 0.01


class Index(NamedTuple):
    """The usable rows of a dataset, measured.

    Attributes:
        row_ids: (R,) place of each usable row in the dataset.
        tokens, labels, runs: (R,) counts of each.
        dropped: rows longer than the limit; longest: tokens of the longest row met.
        images: field name → its images, for the fields whose features are kept.
        records: how many the file holds, usable or not.
        skipped: one fault of each record that is left out for it.
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

    @property
    def dropped_share(self) -> float:
        """Share of the records that are too long."""
        return self.dropped / max(1, self.dropped + len(self.row_ids))


def check_records(
    records: list[Record], encoder: Encoder, keep: Sequence[str] = (), quiet: bool = True
) -> tuple[dict[int, Fault], list[Measure]]:
    """Measure every record and decode every image once.

    Args:
        keep: fields whose images are not decoded here, since whoever keeps their features decodes them.

    Returns:
        Place in `records` → its fault, and the measure of each record (empty for a faulty one).
    """
    faults: dict[int, Fault] = {}
    nothing = Measure(0, 0, 0, (), ())
    measures = [nothing] * len(records)
    for i, record in enumerate(track(records, "measuring rows", disable=quiet, transient=True)):
        try:
            measures[i] = encoder.measure(record)
        except RecordError as error:
            faults[i] = error.fault

    users: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        if i not in faults:
            for name, path in record.images(helpers=encoder.stage == "stage1"):
                if name not in keep:
                    users[name, path].append(i)

    def decode(item: tuple[tuple[str, str], list[int]]) -> tuple[list[int], Fault | None]:
        (name, path), rows = item
        try:
            encoder.finder.load(records[rows[0]], name, path)
        except RecordError as error:
            return rows, error.fault
        return rows, None

    with ThreadPoolExecutor() as pool:
        decoded = pool.map(decode, users.items())
        for rows, fault in track(decoded, "decoding images", total=len(users), disable=quiet, transient=True):
            if fault:
                faults |= {i: replace(fault, line=records[i].line) for i in rows if i not in faults}
    for i in faults:
        measures[i] = nothing
    return faults, measures


def faults_error(data_path: Path, faults: Sequence[Fault]) -> UserError:
    """Make the error that says the first fault of a records file and counts the others."""
    first, *others = sorted(faults, key=lambda fault: fault.line)
    rest = f" (and {len(others)} more: `mirage-ds data check {data_path}` lists them)" if others else ""
    return UserError(f"{data_path}: {first}{rest}")


def judge_faults(data_path: Path, faults: Sequence[Fault], count: int, max_bad_share: float | None) -> None:
    """Decide whether the other records may be trained on.

    Args:
        faults: one of each faulty record.
        count: records in the file.
        max_bad_share: share of faulty records that is left out; None where one fault refuses the file.

    Raises:
        UserError: they may not.
    """
    if not faults:
        return
    if max_bad_share is None:
        raise faults_error(data_path, faults)
    if len(faults) > max_bad_share * count:
        first = min(faults, key=lambda fault: fault.line)
        raise UserError(
            f"{data_path}: {len(faults)} of {count} records have a fault, above --max_bad_share {max_bad_share}; the "
            f"first is {first} (`mirage-ds data check {data_path}` lists them)"
        )


def without(index: Index, broken: Mapping[int, Fault], data_path: Path, max_bad_share: float) -> Index:
    """Leave out rows that turned out faulty after they were measured.

    Args:
        broken: dataset row → its fault.

    Raises:
        UserError: too large a share is faulty now, or no row is left.
    """
    skipped = tuple(sorted([*index.skipped, *broken.values()], key=lambda fault: fault.line))
    judge_faults(data_path, skipped, index.records, max_bad_share)
    stays = ~np.isin(index.row_ids, list(broken))
    if not stays.any():
        raise no_row_left(data_path, skipped)
    rows = {name: getattr(index, name)[stays] for name in ("row_ids", "tokens", "labels", "runs")}
    return index._replace(skipped=skipped, **rows)


def no_row_left(data_path: Path, skipped: Sequence[Fault]) -> UserError:
    """Make the error of a file of which faults leave no row."""
    return UserError(f"{data_path}: no usable row: {len(skipped)} record(s) have a fault, the first is {skipped[0]}")


def _keys(records: list[Record], measures: list[Measure], encoder: Encoder, name: str) -> ImageKeys:
    """Key every image of a field; files that several records share are read once."""
    known: dict[Path, Key] = {}

    def key_of(record: Record, path: str) -> Key:
        place = encoder.finder.find(record, name, path)
        if place not in known:
            known[place] = image_key(place)
        return known[place]

    rows = []
    for record, measure in zip(records, measures, strict=True):
        sizes = measure.images if name == "image_input" else measure.helpers
        paths = getattr(record, name) if sizes else ()
        rows.append([(key_of(record, path), size) for path, size in zip(paths, sizes, strict=True)])
    return image_keys(rows)


def build_index(
    data_path: Path,
    encoder: Encoder,
    max_length: int,
    max_dropped_share: float,
    keep: Sequence[str] = (),
    quiet: bool = True,
    max_bad_share: float | None = None,
) -> Index:
    """Check and measure a records file before the first GPU second is spent.

    Args:
        keep: fields ("image_input", "image_output") whose features are kept: their images get keys here and are decoded
            by whoever makes the features.
        max_bad_share: see judge_faults.

    Raises:
        UserError: a record has a fault (with max_bad_share: too large a share of them), too large a share is too long,
            or no row is left.
    """
    records, unread = scan(data_path)
    faulty, measures = check_records(records, encoder, keep, quiet)
    skipped = tuple(sorted([*unread, *faulty.values()], key=lambda fault: fault.line))
    count = len(records) + len(unread)
    judge_faults(data_path, skipped, count, max_bad_share)
    if len(skipped) == count:
        raise no_row_left(data_path, skipped)
    tokens, labels, runs = np.array([measure[:3] for measure in measures], dtype=np.int64).T
    sound = np.array([i not in faulty for i in range(len(records))])
    fits = np.flatnonzero(sound & (tokens <= max_length))
    index = Index(
        row_ids=fits,
        tokens=tokens[fits],
        labels=labels[fits],
        runs=runs[fits],
        dropped=int(sound.sum()) - len(fits),
        longest=int(tokens.max()),
        images={name: _keys(records, measures, encoder, name) for name in keep},
        records=count,
        skipped=skipped,
    )
    if not len(fits):
        raise UserError(
            f"{data_path}: no usable row: all {index.dropped} are longer than --max_length {max_length} "
            f"(the longest has {index.longest} tokens); raise it or lower --max_pixels"
        )
    if index.dropped_share > max_dropped_share:
        raise UserError(
            f"{data_path}: {index.dropped} of {sound.sum()} rows are longer than --max_length {max_length} (the "
            f"longest has {index.longest} tokens), above --max_dropped_share {max_dropped_share}; raise one of them"
        )
    return index


class Rows(torch.utils.data.Dataset):
    """Encodes a row when it is asked for; a faulty one arrives as its Fault, since a worker's exception loses it.

    Args:
        kept: field name → the kept features of its images.
    """

    def __init__(self, records: Dataset, encoder: Encoder, kept: Mapping[str, KeptFeatures]):
        self.records = records
        self.encoder = encoder
        self.kept = kept

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Sample | Fault:
        try:
            features = {name: kept.of(row) for name, kept in self.kept.items()}
            images, helpers = features.get("image_input"), features.get("image_output")
            return self.encoder.encode(record_of(self.records[row]), row, images, helpers)
        except RecordError as error:
            return error.fault


def _collate(items: list[Sample | Fault], make: Callable[[list[Sample]], Batch]) -> Batch | Fault:
    for item in items:
        if isinstance(item, Fault):
            return item
    return make([item for item in items if isinstance(item, Sample)])


class Loader:
    """One rank's micro-batches, step by step.

    Args:
        records: the Arrow dataset.
        planner: says which rows run where.
        rank: this rank.
        passes: passes of every micro-batch (see pack.schedule).
        workers: worker processes.
        kept: field name → the kept features of its images.
    """

    def __init__(
        self,
        records: Dataset,
        encoder: Encoder,
        planner: Planner,
        rank: int,
        passes: int,
        workers: int,
        kept: Mapping[str, KeptFeatures] | None = None,
    ):
        self.rows = Rows(records, encoder, kept or {})
        self.planner = planner
        self.rank = rank
        self.workers = workers
        dummy = encoder.dummy((passes - 1) // encoder.latent_size)
        make = partial(collate, passes=passes, dummy=dummy, merge=encoder.images.merge_size)
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
            UserError: a row cannot be encoded; only this rank knows.
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
            if isinstance(item, Fault):
                raise UserError(f"record on {item}", everywhere=False)
            yield item
