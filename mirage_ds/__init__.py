"""mirage_ds: a DeepSpeed trainer for vision-language models that think in latent visual tokens."""

__version__ = "0.1.0"
