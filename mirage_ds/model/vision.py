"""The vision tower: frozen beside the model, or trained inside it.

P patches of C numbers, n images, F merged features, H hidden width of the language model, D layers that DeepStack adds
to (images.py), W = (1 + D) · H.
"""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from mirage_ds.data.batch import Batch
from mirage_ds.model.family import FAMILIES


def features_of(tower: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """Merged features of images in raster order.

    Args:
        pixel_values: (P, C); grid_thw: (n, 3) in patches.

    Returns:
        (F, W) in the tower's dtype.
    """
    found = tower(pixel_values.to(tower.dtype), grid_thw=grid_thw)
    # Only towers with DeepStack have the second attribute.
    return torch.cat([found.pooler_output, *getattr(found, "deepstack_features", ())], dim=-1)


class FrozenTower:
    """The tower that is not trained: outside the module tree, so that ZeRO-3 does not partition it.

    Every rank holds it whole and calls it as often as it likes: no collective hides in it. Images are encoded one by
    one: in one call over several, the last bits of a feature depend on its neighbours, and what is kept on disk would
    depend on who shared a call.

    Args:
        tower: the vision tower, on its device.
    """

    def __init__(self, tower: nn.Module):
        self.tower: Any = tower.requires_grad_(False).eval()

    @property
    def input_width(self) -> int:
        """H: the first of a feature's W numbers, which are the input embedding of its token (images.py)."""
        family = FAMILIES[self.tower.config.model_type.removesuffix("_vision")]
        return int(getattr(self.tower.config, family.output_width))

    @property
    def width(self) -> int:
        """W: H more for each decoder layer that DeepStack adds to."""
        return self.input_width * (1 + len(getattr(self.tower.config, "deepstack_visual_indexes", ())))

    def fingerprint(self) -> str:
        """Hash of what the features are a function of: the tower's configuration and weights."""
        digest = hashlib.sha256(json.dumps(self.tower.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def attach(self, batch: Batch) -> Batch:
        """Give the batch the features of those images that came as pixels, on the tower's device.

        The batch may be on the host: grids are read there, without waiting for the GPU, and pixels alone are moved.
        """
        images, helpers = batch.image_features, batch.helper_features
        if images is None:
            images = self.features(batch.pixel_values, batch.image_grid_thw)
        if helpers is None:
            helpers = self.features(batch.helper_pixel_values, batch.helper_grid_thw)
        return batch._replace(
            image_features=images,
            helper_features=helpers,
            pixel_values=batch.pixel_values.new_empty(0),
            helper_pixel_values=batch.helper_pixel_values.new_empty(0),
        )

    def features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Merged features (F, W) of all images, in order, on the tower's device."""
        device = next(self.tower.parameters()).device
        if not len(grid_thw):
            return torch.empty(0, self.width, dtype=self.tower.dtype, device=device)
        images = zip(pixel_values.to(device).split(grid_thw.prod(-1).tolist()), grid_thw.split(1), strict=True)
        return torch.cat([self._one(pixels, grid.to(device)) for pixels, grid in images])

    @torch.no_grad()
    def _one(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        return features_of(self.tower, pixel_values, grid_thw)


def trained_features(tower: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """Features from a tower that ZeRO-3 shards: called exactly once whatever the batch holds.

    A rank whose micro-batch has no image would skip the tower's collectives and hang the others, so a blank image of
    one merged token stands at the end of every call; its feature is multiplied by zero and dropped.

    Returns:
        (F, W), as `features_of`.
    """
    merge = tower.spatial_merge_size
    blank = pixel_values.new_zeros(merge * merge, pixel_values.shape[1])
    grid = grid_thw.new_tensor([[1, merge, merge]])
    features = features_of(tower, torch.cat([pixel_values, blank]), torch.cat([grid_thw, grid]))
    return features[:-1] + 0 * features[-1:]
