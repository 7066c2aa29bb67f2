"""The frozen tower's features: a function of the image alone, computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirage_ds.model.load import load_tower, read_config
from mirage_ds.model.vision import FrozenTower

SIZES = ((4, 6), (8, 4), (4, 4))


@pytest.fixture
def tower(nano: Path) -> FrozenTower:
    return load_tower(nano, read_config(nano), torch.float32, torch.device("cpu"))


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (P, 1176) and grids (3, 3) of three images."""
    torch.manual_seed(0)
    grids = torch.tensor([[1, height, width] for height, width in SIZES])
    return torch.randn(int(grids.prod(-1).sum()), 1176), grids


def test_features_equal_the_towers_own_in_one_call(
    tower: FrozenTower, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pixels, grids = images
    with torch.no_grad():
        whole = tower.tower(pixels, grid_thw=grids).pooler_output
    # One call over all images multiplies larger matrices: the last bits differ.
    torch.testing.assert_close(tower.features(pixels, grids), whole, rtol=0, atol=1e-5)


def test_neighbours_change_no_bit(tower: FrozenTower, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, grids = images
    together = tower.features(pixels, grids).split([height * width // 4 for height, width in SIZES])
    alone = [
        tower.features(part, grid)
        for part, grid in zip(pixels.split(grids.prod(-1).tolist()), grids.split(1), strict=True)
    ]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_the_fingerprint_is_that_of_weights_and_configuration(tower: FrozenTower, nano: Path) -> None:
    again = load_tower(nano, read_config(nano), torch.float32, torch.device("cpu"))
    assert again.fingerprint() == tower.fingerprint()
    prints = {tower.fingerprint()}
    with torch.no_grad():
        again.tower.merger.ln_q.weight[3] += 1e-6
    prints.add(again.fingerprint())
    half = load_tower(nano, read_config(nano), torch.bfloat16, torch.device("cpu"))
    prints.add(half.fingerprint())
    config = read_config(nano)
    config.vision_config.window_size = 56
    prints.add(load_tower(nano, config, torch.float32, torch.device("cpu")).fingerprint())
    assert len(prints) == 4


def test_no_image_gives_no_features(tower: FrozenTower) -> None:
    none = tower.features(torch.empty(0, 1176), torch.empty(0, 3, dtype=torch.int64))
    assert none.shape == (0, tower.tower.config.out_hidden_size)
