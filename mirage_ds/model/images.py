"""Image features among the input embeddings, and DeepStack's behind the first decoder layers.

T tokens of the packed batch, Tq tokens of one pass, F image features, H hidden, D layers that DeepStack adds to (none
in most families).

A feature comes with (1 + D) · H numbers: the first H are the input embedding of its token, the others are added to its
hidden state behind decoder layers 1 … D (DeepStack, arXiv 2406.04334; Qwen3-VL).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Deep(NamedTuple):
    """What is added to hidden states behind the first layers.

    Attributes:
        features: (D, F + 1, H), the last row zero; rows: (T,) of each token, the zero row where it is of no image.
    """

    features: torch.Tensor
    rows: torch.Tensor

    def add(self, layer: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Add to the output x (Tq, H) of a layer, counted from 0, for tokens (Tq,) of the batch."""
        if layer >= len(self.features):
            return x
        return x + self.features[layer].index_select(0, self.rows.index_select(0, tokens)).to(x.dtype)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Deep":
        """Change the features, if they get a gradient."""
        return self._replace(features=change(self.features)) if self.features.requires_grad else self


def embedded(features: torch.Tensor, width: int) -> torch.Tensor:
    """Return of features (F, (1 + D) · H) what is an input embedding: (F, H)."""
    return features[:, :width]


def place_images(
    embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, Deep | None]:
    """Put image features into input embeddings.

    Args:
        embeddings: (T, H); features: (F, (1 + D) · H); positions: (F,) places of the features among the T.

    Returns:
        (T, H), and what the layers add; None where D is 0.
    """
    width = embeddings.shape[1]
    placed = embeddings.index_copy(0, positions, embedded(features, width).to(embeddings.dtype))
    if features.shape[1] == width:
        return placed, None
    count = len(features)
    deep = features[:, width:].unflatten(1, (-1, width)).transpose(0, 1)
    rows = torch.full((len(embeddings),), count, device=positions.device)
    rows = rows.index_copy(0, positions, torch.arange(count, device=positions.device))
    return placed, Deep(torch.cat([deep, deep.new_zeros(len(deep), 1, width)], dim=1), rows)
