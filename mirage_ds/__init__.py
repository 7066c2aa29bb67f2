"""mirage_ds: a DeepSpeed trainer for vision-language models that think in latent visual tokens."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirage_ds.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Quick commands import this package and must not wait for torch.
    if name == "load":
        from mirage_ds.api import load

        return load
    raise AttributeError(f"module 'mirage_ds' has no attribute {name!r}")
