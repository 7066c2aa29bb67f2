"""Regions of a record's first input image, whose features latents imitate (--compress_strategy region).

A record's `region` is [left, top, right, bottom] in pixels of that image's file as a viewer shows it, upright, before
anything is resized. R rows and C columns of the image's merged features, its cells; n cells in the region.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

import numpy as np

from mirage_ds.data.messages import HELPER_MARK, REGION
from mirage_ds.data.pooling import DROPPED
from mirage_ds.data.record import Record
from mirage_ds.errors import shown

# [left, top, right, bottom] in cells.
Cells = tuple[int, int, int, int]
HOW = "write [left, top, right, bottom] in pixels of the first input image"


def cells_of(record: Record, sizes: Sequence[tuple[int, int]], sides: Sequence[tuple[int, int]]) -> Cells:
    """Return the cells that a record's region touches, whole ones: at least one, for no box is empty.

    Args:
        sizes: (height, width) of each input image in pixels; sides: (R, C) of each.

    Raises:
        RecordError: there is no image or no region, it is no box inside the first image, or the answer has several
            places for it.
    """
    if not sizes:
        raise record.fault("image_input", "no image that a region could be of", "add its path, or leave the row out")
    (height, width), (rows, columns) = sizes[0], sides[0]
    value = record.extra.get(REGION)
    if isinstance(value, str):
        # A list in a table of texts.
        with suppress(ValueError):
            value = json.loads(value)
    if value is None:
        how = f"{HOW}, name its column by --columns region=…, or choose another --compress_strategy"
        raise record.fault(REGION, "missing, and its features are what the latents learn", how)
    numbers = isinstance(value, list) and all(type(one) in (int, float) and math.isfinite(one) for one in value)
    if not numbers or len(value) != 4:
        raise record.fault(REGION, f"expected four numbers, found {shown(value)}", HOW)
    # Exact, so that a box that ends where a cell does takes no further one.
    left, top, right, bottom = map(Fraction, value)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise record.fault(REGION, f"{shown(value)} is no box in an image of {width}×{height} pixels", HOW)
    if max(right, bottom) <= 1 < min(width, height):
        raise record.fault(REGION, f"{shown(value)} is within one pixel, as shares of the image would be", HOW)
    if record.text_output.count(HELPER_MARK) > 1:
        raise record.fault("text_output", f"several {HELPER_MARK} marks, and a row has one region", "leave one")
    across, down = Fraction(columns, width), Fraction(rows, height)
    return math.floor(left * across), math.floor(top * down), math.ceil(right * across), math.ceil(bottom * down)


def count_of(cells: Cells) -> int:
    """Return n."""
    left, top, right, bottom = cells
    return (right - left) * (bottom - top)


def groups_of(cells: Cells, columns: int, features: int) -> np.ndarray:
    """Assign merged features of a row's images to its latents: one each in raster order, from the first image alone.

    Args:
        columns: C of the first image; features: of all its images.

    Returns:
        (features,) int64: the latent, DROPPED outside of the region.
    """
    left, top, right, bottom = cells
    groups = np.full(features, DROPPED, dtype=np.int64)
    places = np.arange(top, bottom)[:, None] * columns + np.arange(left, right)
    groups[places.reshape(-1)] = np.arange(places.size)
    return groups
