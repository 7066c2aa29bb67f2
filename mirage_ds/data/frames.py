"""What Python holds: rows of a pandas frame, a data set of `datasets`, an Arrow table or dicts; pixels of a picture."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mirage_ds.data.images import png_of, upright_rgb
from mirage_ds.data.sources import BATCH_ROWS, dicts_of
from mirage_ds.errors import UserError

CHANNELS = (1, 3, 4)


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
        rows = (row for part in data.with_format("arrow").iter(BATCH_ROWS) for row in dicts_of(part))
    elif hasattr(data, "to_pylist"):
        rows = dicts_of(data)
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):
        rows = data.to_dict("records")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(f"record on line {number}: expected a dict, found {type(row).__name__}; write one")
        try:
            values = {str(name): _held(value) for name, value in row.items()}
        except ValueError as error:
            raise UserError(f"record on line {number}: a picture {error}") from None
        yield values


def _held(value: Any) -> Any:
    """Return a value as a row of a file has it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if _is_array(value) and value.ndim < 2:
        # A list of a row, as pandas reads it from Parquet.
        value = value.tolist()
    value = as_rgb(value)
    if isinstance(value, Image.Image):
        return {"bytes": png_of(value, level=1)}
    if isinstance(value, Mapping):
        return {str(name): _held(one) for name, one in value.items()}
    return [_held(one) for one in value] if isinstance(value, (list, tuple)) else value


def _is_array(value: Any) -> bool:
    """Tell whether a value is an array, or a tensor of torch, which is not imported for that."""
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def from_pixels(pixels: Any) -> Image.Image:
    """Make an image of (height, width), (height, width, channels) or, as torch has it, (channels, height, width).

    Args:
        pixels: an array, or a tensor of torch: 0 … 255 in whole numbers, 0 … 1 in others.

    Raises:
        ValueError: another shape or other values; the message says what it takes.
    """
    channels_first = pixels.ndim == 3 and pixels.shape[0] in CHANNELS
    if isinstance(pixels, np.ndarray):
        channels_first = channels_first and pixels.shape[2] not in CHANNELS
    else:
        pixels = pixels.detach().cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()
    shape, whole = pixels.shape, pixels.dtype.kind in "iu"
    if channels_first:
        pixels = np.moveaxis(pixels, 0, 2)
    if not pixels.size or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in CHANNELS)):
        raise ValueError(f"is an array of shape {shape}; give (height, width) or (height, width, 3)")
    most = 255 if whole else 1
    # Written so that NaN is refused.
    if not (pixels.min() >= 0 and pixels.max() <= most):
        raise ValueError(f"has {pixels.dtype} values beyond 0 … {most}; give uint8, or floats from 0 to 1")
    pixels = pixels if whole else np.round(255 * pixels)
    return Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels, np.uint8))


def as_rgb(picture: Any) -> Any:
    """Return an image, or the pixels of one, as RGB; what is neither as it is.

    Raises:
        ValueError: pixels or an image that cannot be; the message says what to give.
    """
    image = from_pixels(picture) if _is_array(picture) else picture
    if not isinstance(image, Image.Image):
        return image
    made = upright_rgb(image)
    if made is None:
        raise ValueError("has 32 bits a channel, of unknown range; give it with 8 bits")
    return made
