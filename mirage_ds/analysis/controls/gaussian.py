"""A normal distribution estimated from fewer vectors than they are wide. n vectors, H hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Two vectors lie alike on both sides of their mean, so that nothing says how far the estimate may be off.
LEAST = 3


@dataclass(frozen=True)
class Gaussian:
    """Mean, and covariance (1 − share) · Xᵀ X / n + share · variance · I, never written out as (H, H).

    Attributes:
        mean: (H,) float64; deviations: X (n, H) float64, the vectors less their mean.
        share: of the covariance that is shrunk to a multiple of the identity.
        variance: mean variance of a coordinate.
    """

    mean: torch.Tensor
    deviations: torch.Tensor
    share: float
    variance: float

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Gaussian:
        """Estimate from vectors (n, H), n ≥ LEAST, with the shrinkage of Ledoit and Wolf.

        J. Multivariate Analysis 88 (2004): the share whose expected squared error is least for any distribution. With
        the sample mean in place of the true one, and covariances divided by n.
        """
        mean = vectors.double().mean(0)
        deviations = vectors.double() - mean
        n, width = deviations.shape
        # Everything follows from the (n, n) inner products: ‖Xᵀ X‖ = ‖X Xᵀ‖.
        inner = deviations @ deviations.T
        variance = float(inner.trace()) / (n * width)
        square = float(inner.square().sum()) / n**2
        # ‖S − m I‖², and the mean over vectors of ‖x xᵀ − S‖² divided by n: how far S may be from the truth.
        spread = square - width * variance**2
        error = (float(inner.diagonal().square().sum()) / n - square) / n
        share = min(1.0, error / spread) if spread > 0 else 0.0
        return cls(mean, deviations, share, variance)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw (count, H) vectors, float64."""
        n, width = self.deviations.shape
        seen = torch.randn(count, n, dtype=torch.float64, generator=generator)
        free = torch.randn(count, width, dtype=torch.float64, generator=generator)
        scale = ((1 - self.share) / n) ** 0.5
        return self.mean + scale * (seen @ self.deviations) + (self.share * self.variance) ** 0.5 * free
