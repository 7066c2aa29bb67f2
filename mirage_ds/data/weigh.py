"""Rows of several sources in the proportions that a run asks for.

R usable rows, S sources.
"""

from __future__ import annotations

import hashlib

import numpy as np

from mirage_ds.config.mixture import Mixture, Records
from mirage_ds.data.loader import Index
from mirage_ds.data.proportion import most
from mirage_ds.data.sources import find_files
from mirage_ds.errors import UserError


def sources_of(index: Index, mixture: Mixture) -> np.ndarray:
    """Return (R,) the place in the mixture of each usable row's source."""
    place = {file: at for at, part in enumerate(mixture.parts) for file in find_files(part.file)}
    of_file = np.array([place[file] for file in index.rows.files])
    return of_file[index.rows["file"][index.row_ids]]


def weighed(index: Index, mixture: Mixture, seed: int) -> Index:
    """Leave out rows by chance until the sources' shares are as their weights; without weights all stay.

    The same rows are chosen on every rank and after every start: the choice hangs on the seed, the source's place in
    the mixture (mixture.records_of) and its rows alone.

    Raises:
        UserError: a source has no usable row, or gets none.
    """
    source = sources_of(index, mixture)
    files = [part.file for part in mixture.parts]
    lengths = np.bincount(source, minlength=len(files)).tolist()
    for file, length in zip(files, lengths, strict=True):
        if not length:
            raise UserError(f"{file}: none of its rows can be used; leave it out, or mend them")
    if mixture.weights is None:
        return index
    counts = most(files, lengths, mixture.weights)
    stays = np.zeros(len(source), dtype=bool)
    for at, count in enumerate(counts):
        chance = np.random.default_rng([seed, at])
        stays[chance.choice(np.flatnonzero(source == at), count, replace=False)] = True
    rows = {name: getattr(index, name)[stays] for name in ("row_ids", "tokens", "labels", "runs", "patches")}
    return index._replace(**rows)


def content(source: str, records: Records) -> str:
    """Return the hash of what a run learns from: of the records, and of their weights where they have some.

    Args:
        source: hash of the records (EncodedRows.source).
    """
    if not isinstance(records, Mixture) or records.weights is None:
        return source
    whole = sum(records.weights)
    told = " ".join([source, *(f"{weight / whole:.9g}" for weight in records.weights)])
    return hashlib.sha256(told.encode()).hexdigest()


def describe(index: Index, mixture: Mixture) -> str:
    """Say how many rows each source gives."""
    counts = np.bincount(sources_of(index, mixture), minlength=len(mixture.parts)).tolist()
    return ", ".join(f"{count} of {part.file}" for count, part in zip(counts, mixture.parts, strict=True))
