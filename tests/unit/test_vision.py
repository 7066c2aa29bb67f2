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


def count_calls(tower: FrozenTower, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the patches of each call of the tower itself."""
    calls: list[int] = []
    forward = tower.tower.forward

    def counted(pixels: torch.Tensor, **rest: torch.Tensor) -> object:
        calls.append(len(pixels))
        return forward(pixels, **rest)

    monkeypatch.setattr(tower.tower, "forward", counted)
    return calls


def test_features_equal_the_towers_own_in_one_call(
    tower: FrozenTower, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pixels, grids = images
    with torch.no_grad():
        whole = tower.tower(pixels, grid_thw=grids).pooler_output
    # One call over all images multiplies larger matrices: the last bits differ.
    torch.testing.assert_close(tower.features(pixels, grids), whole, rtol=0, atol=1e-5)


def test_each_image_is_encoded_once_and_neighbours_change_no_bit(
    tower: FrozenTower, images: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, grids = images
    calls = count_calls(tower, monkeypatch)
    first = tower.features(pixels, grids)
    parts = list(pixels.split(grids.prod(-1).tolist()))
    again = tower.features(torch.cat(parts[::-1]), grids.flip(0))
    assert calls == [height * width for height, width in SIZES]
    merged = [height * width // 4 for height, width in SIZES]
    assert torch.equal(torch.cat(list(again.split(merged[::-1]))[::-1]), first)
    fresh = FrozenTower(tower.tower, cache_bytes=0)
    assert torch.equal(fresh.features(parts[1], grids[1:2]), first.split(merged)[1])


def test_one_changed_pixel_or_shape_is_another_image(
    tower: FrozenTower, images: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, grids = images[0][:24], images[1][:1]
    calls = count_calls(tower, monkeypatch)
    tower.features(pixels, grids)
    changed = pixels.clone()
    changed[3, 7] += 1
    assert not torch.equal(tower.features(changed, grids), tower.features(pixels, grids))
    tower.features(pixels, torch.tensor([[1, 6, 4]]))
    assert calls == [24, 24, 24]


def test_memory_stays_within_its_budget_and_the_oldest_goes_first(
    tower: FrozenTower, images: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, grids = images
    width = tower.tower.config.out_hidden_size
    tower.cache_bytes = (8 + 4) * width * 4  # the second and third image's merged features, float32
    calls = count_calls(tower, monkeypatch)
    tower.features(pixels, grids)
    assert tower.bytes == tower.cache_bytes
    tower.features(pixels[24:], grids[1:])
    assert calls == [24, 32, 16]
    tower.features(pixels[:24], grids[:1])
    assert calls == [24, 32, 16, 24]


def test_no_image_gives_no_features(tower: FrozenTower) -> None:
    none = tower.features(torch.empty(0, 1176), torch.empty(0, 3, dtype=torch.int64))
    assert none.shape == (0, tower.tower.config.out_hidden_size)
