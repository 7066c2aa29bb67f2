"""The vision tower: frozen beside the model, or trained inside it.

P patches, n images, F merged features, H hidden width of the language model.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
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

    Every rank holds it whole and calls it as often as it likes: no collective hides in it. Its features are a function
    of the image, so each image is encoded once and kept in host memory by content. Images are encoded one by one: the
    features then do not depend on which rows shared a micro-batch, to the last bit, and a resumed run finds the same.

    Args:
        tower: the vision tower, on its device.
        cache_bytes: host memory for kept features; those unused for longest go first.
    """

    def __init__(self, tower: nn.Module, cache_bytes: int = 1 << 30):
        self.tower: Any = tower.requires_grad_(False).eval()
        self.cache_bytes = cache_bytes
        self.kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.bytes = 0

    def attach(self, batch: Batch) -> Batch:
        """Replace the batch's pixels by their features, on the batch's device."""
        return batch._replace(
            image_features=self.features(batch.pixel_values, batch.image_grid_thw),
            helper_features=self.features(batch.helper_pixel_values, batch.helper_grid_thw),
            pixel_values=batch.pixel_values.new_empty(0),
            helper_pixel_values=batch.helper_pixel_values.new_empty(0),
        )

    def features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Merged features (F, H) of all images, in order, on the device of `pixel_values`."""
        if not len(grid_thw):
            return pixel_values.new_empty(0, self.tower.config.out_hidden_size, dtype=self.tower.dtype)
        images = zip(pixel_values.split(grid_thw.prod(-1).tolist()), grid_thw.split(1), strict=True)
        return torch.cat([self._one(pixels, grid) for pixels, grid in images]).to(pixel_values.device)

    @torch.no_grad()
    def _one(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        content = grid_thw.cpu().numpy().tobytes() + pixel_values.cpu().numpy().tobytes()
        key = hashlib.blake2b(content, digest_size=16).digest()
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        device = next(self.tower.parameters()).device
        found = features_of(self.tower, pixel_values.to(device), grid_thw.to(device)).cpu()
        self.kept[key] = found
        self.bytes += found.nbytes
        while self.bytes > self.cache_bytes:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return found


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
