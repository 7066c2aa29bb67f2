"""Pictures for tests, the same on every run."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(size: tuple[int, int], spread: float, seed: int = 0) -> Image.Image:
    """Draw grey noise around 128, as Image.effect_noise does, whose draws depend on what was drawn before.

    Args:
        size: width and height.
        spread: standard deviation.
    """
    grey = np.random.default_rng((seed, *size)).normal(128, spread, size[::-1])
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
