"""lmms-eval's model `mirage`, which the entry point `lmms_eval.models` names. Needs lmms-eval and transformers."""

from typing import Any


def manifest() -> Any:
    """Name the model and its class, which is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("mirage", chat_class_path=f"{__name__}.model.Mirage")
