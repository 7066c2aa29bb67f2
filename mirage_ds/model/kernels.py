"""Fused kernels for what a decoder layer computes between its products: Liger-Kernel's RMSNorm and SwiGLU.

Its own `apply_liger_kernel_to_…` changes names inside transformers for the whole process, the vision tower's too. Here
its modules stand in LayerCall's copies of a layer (layers.py) around the layer's own weights: decoding, the tower and
every saved name stay as they are. Rotary positions stay transformers' own, which its attention calls by name.
"""

import torch
from torch import nn

from mirage_ds.errors import UserError


def check_device(kernels: str | None, device: torch.device) -> None:
    """Refuse kernels that cannot run on the device; UserError says so."""
    if kernels is not None and device.type != "cuda":
        raise UserError(f"--kernels {kernels} needs a CUDA GPU and this run is on {device.type}; leave it out")


def use_liger(layer: nn.Module) -> None:
    """Put Liger's modules, with the weights that are there, in place of a decoder layer's norms and MLP."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    for name, module in list(layer.named_modules()):
        parent, _, last = name.rpartition(".")
        made: nn.Module
        with torch.device("meta"):
            if hasattr(module, "variance_epsilon"):
                made = LigerRMSNorm(1, module.variance_epsilon)
                made.weight = module.weight
            elif hasattr(module, "gate_proj"):
                made = LigerSwiGLUMLP(module.config)
                made.gate_proj, made.up_proj, made.down_proj = module.gate_proj, module.up_proj, module.down_proj
            else:
                continue
        setattr(layer.get_submodule(parent), last, made)
