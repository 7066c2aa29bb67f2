"""The encoder g of helper images that --stage scaffold trains: its k latents are what the answer is learnt from.

n helpers, F merged features of all of them, k latents a helper, H hidden width of the language model, A attention
heads, W numbers of a feature (vision.py), of which the first H are the input embedding of its token.

Scaffolding Minds (arXiv 2608.19669) describes it: cross-attention pooling over the tower's features, and a norm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mirage_ds.model.attention import Ends, varlen_attention

# Their names in a MirageModel.
PREFIX = "target_encoder."
EPSILON = 1e-6
# Of the places' code, as in arXiv 1706.03762, section 3.5.
WAVELENGTHS = 10_000.0
# Spread of the queries at the start. At 1 attention is nearly even, and all latents begin as one mean of the features.
QUERIES = 4.0


class EncoderSize(NamedTuple):
    """What the shapes of an encoder follow from.

    Attributes:
        k: latents; width: H; heads: A.
        merge: patches to a side of a merged token.
    """

    k: int
    width: int
    heads: int
    merge: int


def size_of(config: Any, k: int) -> EncoderSize:
    """Return the size of an encoder for a model of this configuration (transformers' own)."""
    text = config.get_text_config()
    return EncoderSize(k, text.hidden_size, text.num_attention_heads, config.vision_config.spatial_merge_size)


def places(sides: Sequence[tuple[int, int]], width: int, device: torch.device) -> torch.Tensor:
    """Code of each merged feature's row and column: sines and cosines, a quarter of the numbers each.

    The tower's own positions are relative, so a feature alone does not say where it stands.

    Args:
        sides: rows and columns of each image.

    Returns:
        (F, H) float32.
    """
    at = torch.cat([torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in sides])
    quarter = width // 4
    angles = at.to(device)[:, :, None] * WAVELENGTHS ** (-torch.arange(quarter, device=device) / quarter)
    return functional.pad(torch.cat([angles.sin(), angles.cos()], -1).flatten(1), (0, width - 4 * quarter))


class TargetEncoder(nn.Module):
    """k learned queries attend to a helper's features: g = norm(O · attention(q, K x, V x)), x = f / rms(f) + place.

    Args:
        size: see EncoderSize.
        visual: a copy of the tower that is trained with it, else None.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        size: EncoderSize,
        visual: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.size, width = size, size.width
        self.queries = nn.Parameter(torch.empty(size.k, width, device=device, dtype=dtype))
        self.key, self.value, self.out = (
            nn.utils.skip_init(nn.Linear, width, width, bias=False, device=device or "cpu", dtype=dtype)
            for _ in range(3)
        )
        self.norm = nn.RMSNorm(width, EPSILON, device=device, dtype=dtype)
        self.visual = visual

    @torch.no_grad()
    def start(self, norm: torch.Tensor, seed: int) -> None:
        """Draw the start.

        Args:
            norm: (H,) weight of the language model's final norm: latents begin with the size of its hidden states.
            seed: torch's own generator is left as it is.
        """
        generator = torch.Generator().manual_seed(seed)
        for weight in (self.queries, self.key.weight, self.value.weight, self.out.weight):
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * (QUERIES if weight is self.queries else self.size.width**-0.5))
        self.norm.weight.copy_(norm)

    def forward(self, features: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Return the latents (n · k, H) of n helpers.

        A blank helper stands at the end of every call, so that a rank without helpers calls every module (ZeRO-3).

        Args:
            features: (F, W); grids: (n, 3) in patches.
        """
        k, width, heads, merge = self.size
        sides = [*((rows // merge, columns // merge) for _, rows, columns in grids.tolist()), (1, 1)]
        own = functional.pad(features[:, :width].to(self.queries.dtype), (0, 0, 0, 1))
        x = functional.rms_norm(own, (width,), eps=EPSILON) + places(sides, width, own.device).to(own.dtype)
        lengths = [rows * columns for rows, columns in sides]
        cu_q, cu_k = (functional.pad(torch.tensor(each).cumsum(0), (1, 0)).int().to(own.device)
                      for each in ([k] * len(sides), lengths))  # fmt: skip
        q = self.queries.repeat(len(sides), 1)
        q, keys, values = (one.unflatten(1, (heads, -1)) for one in (q, self.key(x), self.value(x)))
        made = varlen_attention(q, keys, values, Ends(cu_q, cu_k, k, max(lengths), causal=False))
        # Under torch_autocast products are in another dtype than the norm's weight.
        latents = self.norm(self.out(made.flatten(1)).to(own.dtype))
        return latents[:-k] + 0 * latents[-k:].sum()
