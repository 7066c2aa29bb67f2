"""Trained adapters: read out of an engine or a checkpoint, merged into the weights, written in PEFT's own format.

V vocabulary rows, H hidden, R latent tokens, r rank.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mirage_ds.engine.card import hub_name
from mirage_ds.model.forward import MirageModel
from mirage_ds.model.gathered import gathered
from mirage_ds.model.lora import Lora
from mirage_ds.model.shards import write_tensors

# Beside the merged model.
FOLDER = "adapter"
# A MirageModel's names of the rows, as flat names.
ROWS = {"rows.weight": "model.embed_tokens.rows", "head.rows": "lm_head.rows"}


def adapter_name(parameter: str) -> str | None:
    """Turn a MirageModel's name of a part of the adapter into a flat one; None where it is another parameter.

    `language_model.layers.0.mlp.up_proj.lora_A.default.weight` is `model.layers.0.mlp.up_proj.lora_A`.
    """
    found = re.fullmatch(r"language_model\.(.+\.lora_[AB])\.default\.weight", parameter)
    return f"model.{found[1]}" if found else ROWS.get(parameter)


class Adapter(NamedTuple):
    """A whole adapter.

    Attributes:
        tensors: flat name → A (r, in), B (out, r) or rows (R, H), in the dtype of the forward.
    """

    lora: Lora
    tensors: Mapping[str, torch.Tensor]

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight with what was trained of it inside: W + alpha / r · B · A in float32, then W's dtype.

        Args:
            name: its flat name (load.public_name). A weight that has no adapter is returned as it is.
        """
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in self.tensors:
            a, b = (self.tensors[f"{layer}.lora_{part}"].to(weight.device).float() for part in "AB")
            return (weight.float() + self.lora.scale * (b @ a)).to(weight.dtype)
        if f"{layer}.rows" in self.tensors:
            ids = torch.tensor(self.lora.tokens, device=weight.device)
            return weight.index_copy(0, ids, self.tensors[f"{layer}.rows"].to(weight))
        return weight

    def write(self, folder: Path, base: Path) -> None:
        """Write the adapter as `peft.PeftModel.from_pretrained` reads it, in place of an earlier one.

        Args:
            folder: of the merged model; the adapter's own is FOLDER in it.
            base: the model folder that was adapted.
        """
        from peft import LoraConfig

        config: Any = LoraConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            target_modules=self.lora.pattern,
            trainable_token_indices={
                module: list(self.lora.tokens)
                for module in ("embed_tokens", "lm_head")
                if any(name.endswith(f"{module}.rows") for name in self.tensors)
            },
            base_model_name_or_path=hub_name(str(base.resolve())) or str(base.resolve()),
            inference_mode=True,
        )
        # Not beside and renamed: without config.json, which comes last, the folder is no model.
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        config.save_pretrained(place)
        tensors = {_peft_name(name): tensor.contiguous() for name, tensor in self.tensors.items()}
        write_tensors(tensors, place / "adapter_model.safetensors")


def _peft_name(name: str) -> str:
    """Turn a flat name into PEFT's, which says where it stands in transformers' whole model."""
    name = re.sub(r"^model\.", "model.language_model.", name)
    if name.endswith(".rows"):
        return f"base_model.model.{name.removesuffix('.rows')}.token_adapter.trainable_tokens_delta"
    return f"base_model.model.{name}.weight"


def trained_adapter(model: MirageModel, keep: bool, whole: bool = False) -> Adapter | None:
    """Read the adapter of a model in training, one parameter gathered at a time; None where it has none.

    All ranks call it.

    Args:
        keep: whether this rank wants the tensors; the others get none.
        whole: the parameters are gathered already; DeepSpeed does not gather one twice.
    """
    if model.lora is None:
        return None
    tensors = {}
    for name, parameter in model.named_parameters():
        flat = adapter_name(name)
        if flat is not None:
            with nullcontext() if whole else gathered([parameter]):
                if keep:
                    tensors[flat] = parameter.detach().cpu().clone()
    return Adapter(model.lora, tensors)


def stored_adapter(lora: Lora, masters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, tied: bool) -> Adapter:
    """Read the adapter out of a checkpoint's float32 masters, in the dtype in which the forward had it.

    Args:
        tied: embedding and head are one matrix; their rows, one parameter, stand in the checkpoint twice.
    """
    tensors = {}
    for stored, tensor in masters:
        name = adapter_name(stored)
        if name is not None and not (tied and name == ROWS["head.rows"]):
            tensors[name] = tensor.contiguous().to(dtype)
    return Adapter(lora, tensors)


def note_of(lora: Lora | None) -> dict[str, Any] | None:
    """Say in a checkpoint's state what its adapters are; the seed stands there by itself."""
    if lora is None:
        return None
    return dict(rank=lora.rank, alpha=lora.alpha, targets=list(lora.targets), tokens=list(lora.tokens))


def lora_of(state: Mapping[str, Any]) -> Lora | None:
    """Return what a checkpoint's state says of its adapters; None where it has none."""
    said = state.get("lora")
    if said is None:
        return None
    return Lora(said["rank"], said["alpha"], tuple(said["targets"]), tuple(said["tokens"]), state["seed"])
