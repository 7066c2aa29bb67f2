"""The vision tower: frozen beside the model, or trained inside it.

P patches, n images, F merged features, H hidden width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mirage_ds.data.batch import Batch


def features_of(tower: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """Merged features of images in raster order.

    Args:
        pixel_values: (P, 1176); grid_thw: (n, 3) in patches.

    Returns:
        (F, H) in the tower's dtype.
    """
    return tower(pixel_values.to(tower.dtype), grid_thw=grid_thw).pooler_output


class FrozenTower:
    """The tower that is not trained: outside the module tree, so that ZeRO-3 does not partition it.

    Every rank holds it whole and calls it as often as it likes: no collective hides in it.
    """

    def __init__(self, tower: nn.Module):
        self.tower: Any = tower.requires_grad_(False).eval()

    @torch.no_grad()
    def attach(self, batch: Batch) -> Batch:
        """Replace the batch's pixels by their features."""
        return batch._replace(
            image_features=self._features(batch.pixel_values, batch.image_grid_thw),
            helper_features=self._features(batch.helper_pixel_values, batch.helper_grid_thw),
            pixel_values=batch.pixel_values.new_empty(0),
            helper_pixel_values=batch.helper_pixel_values.new_empty(0),
        )

    def _features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        if not len(grid_thw):
            return torch.empty(0, self.tower.config.out_hidden_size, dtype=self.tower.dtype, device=pixel_values.device)
        return features_of(self.tower, pixel_values, grid_thw)


def trained_features(tower: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """Features from a tower that ZeRO-3 shards: called exactly once whatever the batch holds.

    A rank whose micro-batch has no image would skip the tower's collectives and hang the others, so a blank image of
    one merged token stands at the end of every call; its feature is multiplied by zero and dropped.

    Returns:
        (F, H), as `features_of`.
    """
    merge = tower.spatial_merge_size
    blank = pixel_values.new_zeros(merge * merge, pixel_values.shape[1])
    grid = grid_thw.new_tensor([[1, merge, merge]])
    features = features_of(tower, torch.cat([pixel_values, blank]), torch.cat([grid_thw, grid]))
    return features[:-1] + 0 * features[-1:]
