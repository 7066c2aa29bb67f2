"""Rows of what Python holds: a pandas frame, a data set of `datasets`, an Arrow table, or dicts; pictures as PNG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mirage_ds.data.images import png_of
from mirage_ds.data.sources import BATCH_ROWS
from mirage_ds.errors import UserError


def rows_of_frame(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a frame or data set; pictures that PIL or numpy hold become PNG, paths become texts.

    Args:
        data: a `datasets` Dataset (its stored pictures are not decoded), a pandas frame, an Arrow table, or dicts.

    Raises:
        UserError: a row is none.
    """
    rows: Iterable[Any] = data
    if isinstance(data, Mapping):
        raise UserError("records: a dict of data; give one data set of it, such as data['train']")
    if hasattr(data, "with_format"):
        rows = (row for part in data.with_format("arrow").iter(BATCH_ROWS) for row in part.to_pylist())
    elif hasattr(data, "to_pylist"):
        rows = data.to_pylist()
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):
        rows = data.to_dict("records")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(f"record on line {number}: expected a dict, found {type(row).__name__}; write one")
        yield {str(name): _held(value) for name, value in row.items()}


def _held(value: Any) -> Any:
    """Return a value as a row of a file has it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        # A list of a row, as pandas reads it from Parquet, or the pixels of a picture.
        return [_held(one) for one in value.tolist()] if value.ndim < 2 else _held(Image.fromarray(value))
    if isinstance(value, Image.Image):
        return {"bytes": png_of(value, level=1)}
    if isinstance(value, Mapping):
        return {str(name): _held(one) for name, one in value.items()}
    return [_held(one) for one in value] if isinstance(value, (list, tuple)) else value
