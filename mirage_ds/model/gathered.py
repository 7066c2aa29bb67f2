"""Whole parameters where ZeRO-3 has sharded them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Hold the whole parameters on every rank while it lasts, for reading. All ranks call it."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
    return whole
