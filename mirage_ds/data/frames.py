"""Rows of what Python holds: a pandas frame, a data set of `datasets`, an Arrow table, or dicts; pictures as PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mirage_ds.data.asked import as_rgb
from mirage_ds.data.sources import BATCH_ROWS
from mirage_ds.errors import UserError


def rows_of_frame(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a frame or data set; pictures that PIL, numpy or torch hold become PNG, paths become texts.

    Args:
        data: a `datasets` Dataset (its stored pictures are not decoded), a pandas frame, an Arrow table, or dicts.

    Raises:
        UserError: a row is none, or a picture cannot be one.
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
        try:
            yield {str(name): _held(value) for name, value in row.items()}
        except ValueError as error:
            raise UserError(f"record on line {number}: a picture {error}") from None


def _held(value: Any) -> Any:
    """Return a value as a row of a file has it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim < 2:
        # A list of a row, as pandas reads it from Parquet.
        value = value.tolist()
    value = as_rgb(value)
    if isinstance(value, Image.Image):
        content = io.BytesIO()
        value.save(content, "PNG", compress_level=1)
        return {"bytes": content.getvalue()}
    if isinstance(value, Mapping):
        return {str(name): _held(one) for name, one in value.items()}
    return [_held(one) for one in value] if isinstance(value, (list, tuple)) else value
