"""The flags of `mirage-ds controls`. Imports no torch: the command line's `--help` is quick."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mirage_ds.analysis.controls.names import CONDITIONS
from mirage_ds.evaluate.spec import ModelSpec, RecordsSpec


class ControlsSpec(ModelSpec, RecordsSpec):
    """What is compared; evaluate's flags keep their names and meanings."""

    latents: str = Field(
        ",".join(CONDITIONS),
        description="What is fed at the slots, compared with own; path: the latents of one path or of another.",
    )
    helper_min_pixels: int | None = Field(None, description="Smallest helper image, as it was trained with.")
    helper_max_pixels: int | None = Field(None, description="Largest helper image, as it was trained with.")
    seed: int = Field(42, ge=0, lt=2**31, description="Of vectors, partners, paths and resamples.")
    markdown: Path | None = Field(None, description="Write the tables to this Markdown file.")
