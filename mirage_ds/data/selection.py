"""Which rows of an index are trained on: those without a fault that are not too long, weighed where a run asks for it.

R selected rows, S sources.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np

from mirage_ds.config.columns import RECOGNISED, Columns
from mirage_ds.config.mixture import Mixture, Records, most
from mirage_ds.data.folders import find_files
from mirage_ds.data.index import Index
from mirage_ds.data.record import Fault
from mirage_ds.data.record_files import faults_error, lists
from mirage_ds.errors import UserError

# A share of dropped rows above this is worth a line in the log; --max_dropped_share decides when it is an error.
WARN_DROPPED_SHARE = 0.01


class Selection(NamedTuple):
    """The rows of an index that can be trained on, measured.

    Attributes:
        row_ids: (R,) place of each row in the index.
        tokens, labels, runs, latents: (R,) counts of each.
        patches: (R,) vision patches of its images: of the input images and, in stage1, of the helpers.
        dropped: rows longer than the limit.

        skipped: one fault of each record that is left out for it.
        rows: the index.
    """

    row_ids: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    runs: np.ndarray
    latents: np.ndarray
    dropped: int

    skipped: tuple[Fault, ...]
    patches: np.ndarray
    rows: Index

    @property
    def dropped_share(self) -> float:
        """Share of the records that are too long."""
        return self.dropped / max(1, self.dropped + len(self.row_ids))

    def only(self, stays: np.ndarray) -> Self:
        """Leave out rows; `stays`: (R,) bool."""
        names = ["row_ids", "tokens", "labels", "runs", "latents", "patches"]
        return self._replace(**{name: getattr(self, name)[stays] for name in names})


def by_place(fault: Fault) -> tuple[str, int]:
    """Sort faults in the order of their records."""
    return fault.file, fault.line


def judge_faults(data_path: Records, first: Fault, count: int, records: int, left: int, max_bad_share: float) -> None:
    """Decide whether the other records may be trained on.

    Args:
        first: the first fault; count: how many records have one.
        left: rows that can be trained on.
        max_bad_share: share of faulty records that is left out.

    Raises:
        UserError: they may not.
    """
    if count > max_bad_share * records:
        what = f"{count} of {records} records have a fault, above --max_bad_share {max_bad_share}"
        raise UserError(f"{data_path}: {what}; the first is {first} ({lists(data_path)})")
    if not left:
        raise UserError(f"{data_path}: no usable row: {count} record(s) have a fault, the first is {first}")


def usable(
    rows: Index,
    data_path: Records,
    max_length: int,
    max_dropped_share: float,
    max_bad_share: float | None = None,
    answer: int = 0,
) -> Selection:
    """Choose the rows that can be trained on.

    Args:
        max_bad_share: see judge_faults; None where one fault refuses the records.
        answer: tokens of an answer that is still to be sampled, at most; they count as the row's.

    Raises:
        UserError: a record has a fault (with max_bad_share: too large a share of them), too large a share is too long,
            or no row is left.
    """
    sound = len(rows) - rows.faults
    if rows.faults:
        if max_bad_share is None:
            raise faults_error(data_path, rows.all_faults(), rows.faults, len(rows))
        judge_faults(data_path, next(rows.all_faults()), rows.faults, len(rows), sound, max_bad_share)
    tokens = np.where(rows["tokens"] > 0, rows["tokens"] + answer, 0)
    fits = np.flatnonzero((tokens > 0) & (tokens <= max_length))
    counts = {"tokens": tokens[fits]} | {name: rows[name][fits] for name in ("labels", "runs", "latents", "patches")}
    skipped = tuple(rows.all_faults())
    selection = Selection(row_ids=fits, **counts, dropped=sound - len(fits), skipped=skipped, rows=rows)
    dropped, above = selection.dropped, f"--max_length {max_length} (the longest has {tokens.max()} tokens)"
    if not len(fits):
        what = f"no usable row: all {dropped} are longer than {above}"
        raise UserError(f"{data_path}: {what}; raise it or lower --max_pixels")
    if selection.dropped_share > max_dropped_share:
        what = f"{dropped} of {sound} rows are longer than {above}, above --max_dropped_share {max_dropped_share}"
        raise UserError(f"{data_path}: {what}; raise one of them")
    return selection


def without(selection: Selection, broken: Mapping[int, Fault], data_path: Records, max_bad_share: float) -> Selection:
    """Leave out rows that turned out faulty after they were measured.

    Args:
        broken: row → the fault of one of its images, that of the first record that was seen to have it.

    Raises:
        UserError: too large a share is faulty now, or no row is left.
    """
    if not broken:
        return selection
    faults = (_own(broken, row, selection.rows) for row in sorted(broken))
    skipped = tuple(sorted([*selection.skipped, *faults], key=by_place))
    left = selection.only(~np.isin(selection.row_ids, list(broken)))._replace(skipped=skipped)
    judge_faults(data_path, skipped[0], len(skipped), len(selection.rows), len(left.row_ids), max_bad_share)
    return left


def _own(broken: Mapping[int, Fault], row: int, index: Index) -> Fault:
    """Return the fault of a row, at its own line."""
    fault = broken[row]
    own = index.named(replace(fault, line=int(index["line"][row])), row)
    same = (own.file, own.line) == (fault.file, fault.line)
    return fault if same else replace(own, what=f"as on {fault.place}: {fault.what}")


def sources_of(selection: Selection, mixture: Mixture) -> np.ndarray:
    """Return (R,) the place in the mixture of each usable row's source."""
    place = {file: at for at, part in enumerate(mixture.parts) for file in find_files(part.file)}
    return np.array([place[file] for file in selection.rows.files])[selection.rows["file"][selection.row_ids]]


def weighed(selection: Selection, mixture: Mixture, seed: int) -> Selection:
    """Leave out rows by chance until the sources' shares are as their weights; without weights all stay.

    The same rows are chosen on every rank and after every start: the choice hangs on the seed, the source's place in
    the mixture (mixture.records_of) and its rows alone.

    Raises:
        UserError: a source has no usable row, or gets none.
    """
    source = sources_of(selection, mixture)
    files = [part.file for part in mixture.parts]
    lengths = np.bincount(source, minlength=len(files)).tolist()
    for file, length in zip(files, lengths, strict=True):
        if not length:
            raise UserError(f"{file}: none of its rows can be used; leave it out, or fix them")
    if mixture.weights is None:
        return selection
    counts = most(files, lengths, mixture.weights)
    stays = np.zeros(len(source), dtype=bool)
    for at, count in enumerate(counts):
        chance = np.random.default_rng([seed, at])
        stays[chance.choice(np.flatnonzero(source == at), count, replace=False)] = True
    return selection.only(stays)


def content(source: str, records: Records, columns: Columns = RECOGNISED) -> str:
    """Return the hash of what a run learns from: of the records, and of weights and named columns if any.

    Args:
        source: hash of the records (Index.source).
    """
    weights = (records.weights if isinstance(records, Mixture) else None) or []
    whole = sum(weights)
    told = [source, *(f"{weight / whole:.9g}" for weight in weights), *("=".join(one) for one in columns.named)]
    return hashlib.sha256(" ".join(told).encode()).hexdigest() if told[1:] else source


def describe(selection: Selection, mixture: Mixture) -> str:
    """Say how many rows each source gives."""
    counts = np.bincount(sources_of(selection, mixture), minlength=len(mixture.parts)).tolist()
    return ", ".join(f"{count} of {part.file}" for count, part in zip(counts, mixture.parts, strict=True))
