"""The flags of `mirage-ds inspect`. Imports no torch: the command line's `--help` is quick."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from mirage_ds.evaluate.spec import DataSpec, FolderSpec, HelperSpec


class InspectSpec(HelperSpec, FolderSpec, DataSpec):
    """What is looked at."""

    out: Path = Field(description="New folder for index.html, the pictures and numbers.json.")
    rows: tuple[NonNegativeInt, ...] = Field((), description="Rows shown in detail, counted from 0. [default: 0]")
    decode: bool = Field(False, description="Show these rows' latents in the model's own decoding too.")
    max_new_tokens: PositiveInt = Field(256, description="With --decode: tokens of an answer, at most.")
    most: PositiveInt = Field(1000, description="Rows that the components and the probe are made of.")
    label: tuple[str, ...] = Field(
        (), description="Keys of the records that the probe reads from the latents; text_output: the answer."
    )
    latent_size: PositiveInt | None = Field(None, description="k; as the model was trained if not set.")
