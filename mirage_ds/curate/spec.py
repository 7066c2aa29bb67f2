"""The flags of `mirage-ds data vary`, `data mix` and `data import`. Imports little: `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from mirage_ds.tasks.task import Settings

Kind = Literal[
    "helper-input", "helper-rows", "helper-text", "helper-swap", "helper-noise", "no-image", "helper-only"
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
QUESTION = "Read the path."


class RewriteSpec(Settings):
    """Where other records are written, and where the images of the given ones lie."""

    seed: int = Field(0, description="the same seed gives the same bytes")
    image_root: Path | None = Field(None, description="second place where relative image paths are looked for")


class VarySpec(RewriteSpec):
    """How records are varied."""

    most: int | None = Field(None, ge=1, description="take only the first so many records")
    question: str | None = Field(None, description=f"helper-only: what is asked [default: {QUESTION}]")
    task: str | None = Field(None, description="helper-text: whose words [default: the record's own task]")


class ImportSpec(RewriteSpec):
    """Where conversations of another layout lie."""

    helper_key: str = Field("helper_images", description="key of a row that holds its helper images")
    split: str = Field("train", description="of a data set of the Hub")
    most: int | None = Field(None, ge=1, description="take only the first so many rows")


class MixSpec(RewriteSpec):
    """How records are mixed."""

    count: int | None = Field(
        None, ge=1, le=10**9, description="rows to write [default: as many as the files have for their weights]"
    )
