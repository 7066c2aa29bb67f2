"""Skips this folder where there is no GPU."""

from __future__ import annotations

import pytest
import torch

WHY = "needs a CUDA GPU, and torch.cuda.is_available() is False on this machine"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=WHY))
