"""Model families: all that differs between them. A new one is an entry here, a preset, and a line in the tests' lists.

What every family shares is used elsewhere as it is: decoder layers that hand keyword arguments on to transformers'
attention interface, M-RoPE on three axes, Qwen2-VL's image processor, a tower called with pixels and a grid. Imports
neither torch nor transformers.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.errors import UserError


@dataclass(frozen=True)
class Family:
    """A family of vision-language models in transformers.

    Attributes:
        kind: `model_type` of its config.json, and its module of transformers.models, which has the classes whole and
            tower and the configuration's; title: for people.
        nested: its published checkpoints name tensors `model.language_model.*` and `model.visual.*`; the older ones
            `model.*` and `visual.*`.
        output_width: key of vision_config that holds the width of a merged feature.
        pixel_mean: mean and spread that pixels are normalised by; CLIP's if None.
    """

    kind: str
    title: str
    whole: str
    tower: str
    nested: bool
    output_width: str = "out_hidden_size"
    pixel_mean: float | None = None

    def _class(self, where: str, name: str) -> Any:
        return getattr(importlib.import_module(f"transformers.models.{self.kind}.{where}_{self.kind}"), name)

    def config_class(self) -> Any:
        """Return the configuration's class."""
        return self._class("configuration", self.whole.replace("ForConditionalGeneration", "Config"))

    def model_class(self) -> Any:
        """Return the whole model's class."""
        return self._class("modeling", self.whole)

    def tower_class(self) -> Any:
        """Return the vision tower's class."""
        return self._class("modeling", self.tower)

    def written_name(self, name: str) -> str:
        """Turn a flat name (load.public_name) into the one that published checkpoints of this family have."""
        if self.nested and name.startswith("visual."):
            return f"model.{name}"
        return re.sub(r"^model\.", "model.language_model.", name) if self.nested else name

    def opened_name(self, name: str) -> str | None:
        """Turn a stored tensor's name into the flat one; None where transformers would not find it by that name."""
        # The nested names, and without their first part, transformers opens in every family.
        if re.match(r"(model\.)?(visual|language_model)\.", name):
            return flat_name(name)
        return name if name == "lm_head.weight" or (name.startswith("model.") and not self.nested) else None


_KNOWN = (
    Family(
        kind="qwen2_5_vl",
        title="Qwen2.5-VL",
        whole="Qwen2_5_VLForConditionalGeneration",
        tower="Qwen2_5_VisionTransformerPretrainedModel",
        nested=False,
    ),
    Family(
        kind="qwen2_vl",
        title="Qwen2-VL",
        whole="Qwen2VLForConditionalGeneration",
        tower="Qwen2VisionTransformerPretrainedModel",
        nested=False,
        output_width="hidden_size",
    ),
    Family(
        kind="qwen3_vl",
        title="Qwen3-VL",
        whole="Qwen3VLForConditionalGeneration",
        tower="Qwen3VLVisionModel",
        nested=True,
        pixel_mean=0.5,
    ),
)
FAMILIES: Mapping[str, Family] = {family.kind: family for family in _KNOWN}
DEFAULT = _KNOWN[0]
# How the class of a model that writes text is called, transformers' own or somebody's own one of the same weights.
_WRITERS = ("ForConditionalGeneration", "ForCausalLM")
# Written by sentence-transformers.
_EMBEDDING_FILES = frozenset({"modules.json", "config_sentence_transformers.json"})


def family_of(kind: Any, where: str) -> Family:
    """Find a family by its `model_type`; UserError where it is none that is known.

    Args:
        where: how the model is called in the message.
    """
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    known = ", ".join(f"{family.title} ({family.kind})" for family in _KNOWN)
    what = "a mixture of experts, " if isinstance(kind, str) and "_moe" in kind else ""
    raise UserError(f"{where}: {what}a model of type {kind!r}; mirage_ds trains {what and 'the dense '}{known}")


def check_kind(values: Any, file: Path) -> Family:
    """Find the family of a model by its config.json; UserError where it is none that can be trained.

    Refused too is a model that writes no text: one that was made for embeddings, ranks or classes.

    Args:
        values: what stands in the file.
        file: the config.json; what stands beside it is looked at too.
    """
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected an object, found {type(values).__name__}; copy the model's own")
    family = family_of(values.get("model_type"), str(file))
    # A shape may be given as a file of any name, in a folder that is no model.
    beside = {one.name for one in file.parent.iterdir()} if file.name == "config.json" else set()
    classes, found = values.get("architectures"), sorted(_EMBEDDING_FILES & beside)
    sign = f"{found[0]} stands beside it" if found else ""
    if isinstance(classes, list) and classes and not any(str(name).endswith(_WRITERS) for name in classes):
        sign = f"config.json's architectures is {', '.join(map(str, classes))}"
    if sign:
        raise UserError(f"{file}: a model that writes no text, such as an embedding model ({sign}); give one that does")
    return family


def flat_name(name: str) -> str:
    """Turn a tensor's name, flat or nested, into the flat one, which this project counts, compares and looks up by."""
    return re.sub(r"^(model\.)?language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))
