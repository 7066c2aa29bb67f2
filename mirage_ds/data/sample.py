"""What one row becomes: its measure, its layout, and the Sample that holds all of it.

T tokens of the row, R rows, n images of a row, I of a field of all rows, P patches (14 × 14 × 2 pixels × 3 channels =
1176 numbers), F merged features, k latents a block, H hidden.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch

IGNORE = -100
Grid = tuple[int, int, int]


class Sample(NamedTuple):
    """One encoded row, unpadded.

    Attributes:
        row: the row's place in the dataset.
        input_ids: (T,) int64.
        labels: (T,) int64, IGNORE where nothing is learnt; labels[i] is the token itself (predicted from i − 1).
        position_ids: (3, T) int64, M-RoPE's time, height and width.
        image_positions: int64, where the merged features of the input images stand.
        pixel_values: (P, 1176) float32; image_grid_thw: (n, 3) int64, in patches.
        runs: the latent blocks as (first latent's position, k).
        helper_pixel_values, helper_grid_thw: the same for the helper images (stage1 only, else empty).
        helper_groups: (F,) int64, the latent of the row that each merged feature of the helpers is averaged into (see
            pooling.pool_groups; runs counted on), of a region those of the input images (region.groups_of); empty where
            there is neither.
        image_features: (F, H) where the frozen tower's features were kept; then there are no pixels.
        helper_features: (blocks · k, H) where the helpers' targets were kept: each is in a group of its own.
        hidden: places of the input images' tokens (picture_places) where text behind the first latent block does not
            see them (--bottleneck); None where it does.
    """

    row: int
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    image_positions: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    runs: tuple[tuple[int, int], ...]
    helper_pixel_values: torch.Tensor
    helper_grid_thw: torch.Tensor
    helper_groups: torch.Tensor
    image_features: torch.Tensor | None = None
    helper_features: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def answered(
        self, ids: Sequence[int], blocks: Iterable[tuple[int, int]] = (), learnt: torch.Tensor | None = None
    ) -> Self:
        """Put a prompt and an answer to it, which is text but for its latent blocks, together.

        Args:
            ids: the answer's tokens, S of them.
            blocks: its latent blocks, as (first latent's place in the answer, k).
            learnt: (S,) bool, which of its tokens are labels; None: none is.
        """
        own = torch.tensor(ids, dtype=torch.int64)
        labels = torch.full_like(own, IGNORE) if learnt is None else torch.where(learnt, own, IGNORE)
        positions = self.position_ids.max() + 1 + torch.arange(len(own))
        return self._replace(
            input_ids=torch.cat([self.input_ids, own]),
            labels=torch.cat([self.labels, labels]),
            position_ids=torch.cat([self.position_ids, positions.expand(3, -1)], dim=1),
            runs=tuple((len(self.input_ids) + at, k) for at, k in blocks),
        )


class Measure(NamedTuple):
    """What planning needs to know of a row before it is encoded.

    Attributes:
        tokens, labels, runs, latents: counts of each.
        images, helpers: merged features of each input image and, in stage1, of each helper image.
    """

    tokens: int
    labels: int
    runs: int
    images: tuple[int, ...]
    helpers: tuple[int, ...]
    latents: int


class Layout(NamedTuple):
    """Where everything in a row stands; with the pixels it is the whole Sample.

    Attributes:
        input_ids: T token ids.
        answer_start: place of the first token behind `<|im_start|>assistant`.
        grids, helper_grids: (t, h, w) in patches of each input image and, in stage1, of each helper image.
        region: the cells of the first image that the latents imitate; None where they imitate none.
    """

    input_ids: Sequence[int] | np.ndarray
    answer_start: int
    grids: list[Grid]
    helper_grids: list[Grid]
    region: tuple[int, int, int, int] | None = None


class ImageKeys(NamedTuple):
    """The images of one field (input or helper images) of all rows.

    Attributes:
        keys: (I, 2) uint64, row by row (images.image_key); sizes: (I,) merged features F of each.
        starts: (R + 1,) where each row's images begin.
    """

    keys: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray

    def rows_of(self, places: np.ndarray) -> np.ndarray:
        """Return the rows, (n,), that the images at these places in `keys` belong to."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def of(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Places in `keys` of these rows' images, row by row, (n,) int64."""
        own = np.asarray(rows, dtype=np.int64)
        first, counts = self.starts[own], self.starts[own + 1] - self.starts[own]
        # An image's place is its row's first one and its number within the row.
        return np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)


def picture_places(image_positions: np.ndarray) -> np.ndarray:
    """Return the places of images' tokens, from vision-start to vision-end, in order: (h,).

    Args:
        image_positions: (F,) of their features.
    """
    return np.unique(image_positions[:, None] + np.arange(-1, 2))


def mrope_positions(input_ids: np.ndarray, grids: list[Grid], image_pad: int, merge: int) -> np.ndarray:
    """M-RoPE positions of one row (arXiv 2409.12191, section 2.1).

    Text and latents advance all three axes by one. An image starts all axes at the next position p; its merged tokens
    are at (p, p + row, p + column); what follows starts at p + max(rows, columns).

    Args:
        input_ids: (T,) with `image_pad` repeated once per merged token.
        grids: (t, h, w) of each image in patches, in order.
        merge: patches a side that are merged into one token.

    Returns:
        (3, T) int64.
    """
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    at, place = 0, 0
    is_image = input_ids == image_pad
    for time, height, width in grids:
        start = at + int(np.argmax(is_image[at:]))
        positions[:, at:start] = place + np.arange(start - at)
        place += start - at
        rows, columns = height // merge, width // merge
        end = start + time * rows * columns
        # A still image is one frame: its time axis stays at the first position.
        positions[:, start:end] = place + np.indices((time, rows, columns)).reshape(3, -1)
        place += max(rows, columns)
        at = end
    positions[:, at:] = place + np.arange(len(input_ids) - at)
    return positions
