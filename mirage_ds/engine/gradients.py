"""What an engine holds of gradients between a step's last backward and its optimizer step."""

import re

import torch

from mirage_ds.model.forward import MirageModel


def gradient_norms(model: MirageModel) -> dict[str, float]:
    """Return the norm of a step's gradient, layer by layer, before clipping. All ranks call it.

    One parameter's gradient is whole at a time, whatever the ZeRO stage.

    Returns:
        Name of a layer, or of a module that is in none → norm over its trained parameters.
    """
    from deepspeed.utils import safe_get_full_grad

    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        # `language_model.layers.3.mlp.up_proj.weight` is part of `language_model.layers.3`.
        layer = re.match(r"(.*?\.\d+)\.", name)
        of = layer[1] if layer else name.rpartition(".")[0]
        gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
        if gradient is not None:
            squares[of] = squares.get(of, 0.0) + float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) ** 2
    return {of: square**0.5 for of, square in squares.items()}
