"""A latent as an action of the policy: what it is drawn from, and how likely a recorded one is.

L latents, H hidden. h is the final-norm hidden state at the position before a latent; without this it is the latent.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mirage_ds.errors import UserError
from mirage_ds.files import HEADS
from mirage_ds.model.folder import header_of

# Their names in a MirageModel.
PREFIX = "latent_heads."
# σ at the start, of the root mean square of h.
START = 0.05
# The natural logarithm of √(2π).
LOG_ROOT = 0.9189385332046727


class LatentHeads(nn.Module):
    """Two linear layers that make z ~ N(h + μ(h), σ(h)²) of a latent.

    Both start at zero: μ at 0 and σ at START · rms(h), whatever the model is. One σ serves all
    numbers of a latent: one for each would be as many parameters as μ has.

    Args:
        width: H.
        device, dtype: of the parameters.
    """

    def __init__(self, width: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.mean = nn.utils.skip_init(nn.Linear, width, width, device=device or "cpu", dtype=dtype)
        self.log_sigma = nn.utils.skip_init(nn.Linear, width, 1, device=device or "cpu", dtype=dtype)
        for parameter in self.parameters():
            # Not drawn: torch's generator is left as it is.
            nn.init.zeros_(parameter)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take h, (L, H), and return the mean h + μ(h), (L, H), and log σ(h), (L, 1), both at least in float32."""
        states = states.to(self.mean.weight.dtype)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        size = wide.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
        return wide + self.mean(states), (START * size).log() + self.log_sigma(states)


def gaussian_logp(latents: torch.Tensor, mean: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """Logarithm of the density of recorded latents: Σ over H, in float64, for thousands of nats differ by hundredths.

    Args:
        latents: (L, H), any dtype, no gradient; mean: (L, H); log_sigma: (L, 1).

    Returns:
        (L,) float64.
    """
    log_sigma = log_sigma.double()
    scaled = (latents.double() - mean.double()) * torch.exp(-log_sigma)
    return (-0.5 * scaled.square() - log_sigma - LOG_ROOT).sum(-1)


def vlpo_logp(latents: torch.Tensor, states: torch.Tensor, sigma: float) -> torch.Tensor:
    """Logarithm of the unnormalised density of Monet's VLPO: −‖z − h‖² / 2σ².

    Args:
        latents: (L, H), any dtype, no gradient; states: h, (L, H); sigma: a setting, 10 in Monet.

    Returns:
        (L,) float64.
    """
    return (latents.double() - states.double()).square().sum(-1) / (-2 * sigma**2)


def load_heads(
    folder: Path, said: bool, width: int, device: torch.device, dtype: torch.dtype, trained: bool
) -> LatentHeads | None:
    """Load a model folder's heads; new ones where it has none and they are to be trained, else None.

    Args:
        said: whether its config.json says that it has some (`mirage.latent_heads`).
        width: H.

    Raises:
        UserError: they are not there, or are not those of this model.
    """
    if not said and not trained:
        return None
    heads = LatentHeads(width, device, dtype).requires_grad_(trained)
    if said:
        file = folder / HEADS
        if not file.is_file():
            raise UserError(f"{file}: no such file, and config.json says that latents are made with it; copy it too")
        wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
        if {name: one.shape for name, one in header_of(file).items()} != wanted:
            raise UserError(f"{file}: its tensors are not those of a model of width {width}; copy the model's own")
        heads.load_state_dict(load_file(file))
    return heads
