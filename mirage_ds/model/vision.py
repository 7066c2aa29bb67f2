"""The vision tower: frozen beside the model, or trained inside it.

P patches of C numbers, n images, F merged features, H hidden width of the language model, D layers that DeepStack adds
to (images.py), W = (1 + D) · H.
"""

import hashlib
import json
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from mirage_ds.data.batch import Batch
from mirage_ds.data.pack import neighbours
from mirage_ds.model.attention import SEGMENTS_NAME
from mirage_ds.model.family import FAMILIES

# Patches that one call on a GPU takes, unless one image alone has more: enough to keep it busy, a quarter of what an
# image at the public processor's limit has.
CALL_PATCHES = 1 << 14
# Raised whenever the tower is called in another way, so that no kept feature of the one is read for one of the other.
WAY = "segments 1"


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

    Every rank holds it whole and calls it as often as it likes: no collective hides in it. In one call over several
    images the last bits of a feature depend on its neighbours, since matrices of another height are multiplied by
    another kernel; nothing else of it does. On a CPU images are encoded one by one, and no bit depends on who shared a
    call.

    Args:
        tower: the vision tower, on its device.

    Attributes:
        call_patches: most patches of a call over several images.
    """

    def __init__(self, tower: nn.Module):
        self.tower: Any = tower.requires_grad_(False).eval()
        self.call_patches = 0 if next(tower.parameters()).device.type == "cpu" else CALL_PATCHES

    def to_cpu(self) -> None:
        """Leave the GPU, where kernels are; what is encoded from now on is little."""
        self.tower.to("cpu").config._attn_implementation = SEGMENTS_NAME + "sdpa"
        self.call_patches = 0

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
        """Hash of what the features are a function of: the tower's configuration and weights, and how it is called."""
        digest = hashlib.sha256(json.dumps(self.tower.config.to_diff_dict(), sort_keys=True, default=str).encode())
        digest.update(f"{WAY}, {self.tower.config._attn_implementation}, {self.call_patches}".encode())
        for name, tensor in sorted(self.tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def attach(self, batch: Batch, helpers: bool = True) -> Batch:
        """Give the batch the features of those images that came as pixels, on the tower's device.

        Args:
            helpers: False leaves pixels of helpers as they are, for a tower that is trained for them.

        The batch may be on the host: grids are read there, without waiting for the GPU, and pixels alone are moved.
        """
        images, found = batch.image_features, batch.helper_features
        if images is None:
            images = self.features(batch.pixel_values, batch.image_grid_thw)
        batch = batch._replace(image_features=images, pixel_values=batch.pixel_values.new_empty(0))
        if not helpers:
            return batch
        if found is None:
            found = self.features(batch.helper_pixel_values, batch.helper_grid_thw)
        return batch._replace(helper_features=found, helper_pixel_values=batch.helper_pixel_values.new_empty(0))

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Merged features (F, W) of all images, in order, on the tower's device.

        The images may be on the host, where grids are read without waiting for the GPU; one call's pixels at a time are
        moved.
        """
        device = next(self.tower.parameters()).device
        sizes = grid_thw.prod(-1).tolist()
        starts = [0, *accumulate(sizes)]
        found = [torch.empty(0, self.width, dtype=self.tower.dtype, device=device)]
        for first, end in neighbours(sizes, self.call_patches):
            pixels = pixel_values[starts[first] : starts[end]].to(device, non_blocking=True)
            found.append(self._call(pixels, grid_thw[first:end].to(device, non_blocking=True)))
        return torch.cat(found)

    def _call(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
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
