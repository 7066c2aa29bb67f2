"""The flags of `mirage-ds inspect`. Imports no torch: the command line's `--help` is quick."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class InspectSpec(BaseModel):
    """What is looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_path: Path = Field(description="Records with answers, as for training.")
    out: Path = Field(description="New folder for index.html, the pictures and numbers.json.")
    rows: str = Field("0", description="Rows shown in detail, counted from 0: 0,5,9.")
    decode: bool = Field(False, description="Show these rows' latents in the model's own decoding too.")
    max_new_tokens: PositiveInt = Field(256, description="With --decode: tokens of an answer, at most.")
    most: PositiveInt = Field(1000, description="Rows that the components and the probe are made of.")
    latent_size: PositiveInt | None = Field(None, description="k; as the model was trained if not set.")
    batch_size: PositiveInt = Field(32, description="Rows that run at a time.")
    image_root: Path | None = Field(None, description="Second place where relative image paths are looked for.")
    processor: Path | None = Field(None, description="Folder that gives the image processor if FOLDER has none.")
    min_pixels: int | None = Field(None, description="Smallest input image; the processor's own if not set.")
    max_pixels: int | None = Field(None, description="Largest input image; the processor's own if not set.")
    helper_min_pixels: int | None = Field(None, description="As --min_pixels, for helper images.")
    helper_max_pixels: int | None = Field(None, description="As --max_pixels, for helper images.")
