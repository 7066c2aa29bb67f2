"""The flags of the commands that decode. Imports little, so that the command line's `--help` is quick."""

from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mirage_ds.config.columns import COLUMNS_HELP, ColumnsText

# The smallest and the largest image; None keeps the processor's own.
Pixels = tuple[int | None, int | None]


class FolderSpec(BaseModel):
    """How a model folder is opened."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    processor: Path | None = Field(None, description="Folder that gives the image processor if FOLDER has none.")
    min_pixels: int | None = Field(None, description="Smallest input image. [default: the folder's, as trained]")
    max_pixels: int | None = Field(None, description="Largest input image. [default: the folder's, as trained]")

    @property
    def pixels(self) -> Pixels:
        """Of input images."""
        return self.min_pixels, self.max_pixels


class HelperSpec(BaseModel):
    """How helper images are opened."""

    helper_min_pixels: int | None = Field(None, description="Smallest helper image, as it was trained with.")
    helper_max_pixels: int | None = Field(None, description="Largest helper image, as it was trained with.")

    @property
    def helper_pixels(self) -> Pixels:
        """Of helper images."""
        return self.helper_min_pixels, self.helper_max_pixels


class LengthSpec(FolderSpec):
    """How long a model's answers are."""

    run_length: str = Field(
        "trained", description="Latents per block: trained (as in training), model (chosen, up to 8) or a number."
    )
    max_new_tokens: PositiveInt = Field(1024, description="Tokens of an answer, latents included, at most.")


class ModelSpec(LengthSpec):
    """How long answers are, and what they are drawn by."""

    seed: NonNegativeInt = Field(42, description="Seed of sampling; a record's draws do not depend on its batch.")


class Sampling(NamedTuple):
    """How tokens are drawn: from the smallest set that holds `top_p` of the probability at this temperature."""

    temperature: float
    top_p: float


# The public code's evaluation: temperature 0.7, top_p 0.9, 1024 new tokens.
PAPER = Sampling(0.7, 0.9)

Decoding = Literal["greedy", "paper"] | Sampling


class DecodingSpec(ModelSpec):
    """How tokens are chosen."""

    decoding: Literal["greedy", "paper", "sampled"] = Field(
        "greedy", description="sampled: with --temperature and --top_p; paper: sampled, temperature 0.7, top_p 0.9."
    )
    temperature: PositiveFloat | None = Field(None, description="For --decoding sampled; 1 if not set.")
    top_p: float | None = Field(None, gt=0, le=1, description="For --decoding sampled; 1 if not set.")
    longest_run: NonNegativeInt = Field(8, description="Latents of a block, at most, where the model ends it.")
    no_latents: bool = Field(False, description="Open no latent block: for base models and those of sft.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None and self.decoding != "sampled":
                raise ValueError(f"--{name} needs --decoding sampled, and it is {self.decoding}: give both, or neither")
        return self

    @property
    def chosen(self) -> Decoding:
        """How tokens are chosen, with the numbers of a sampled answer."""
        return Sampling(self.temperature or 1.0, self.top_p or 1.0) if self.decoding == "sampled" else self.decoding


class DataSpec(BaseModel):
    """Which records are run."""

    data_path: Path = Field(description="Records: a file or a folder, in any form that training reads.")
    columns: ColumnsText = Field(None, description=COLUMNS_HELP)
    image_root: Path | None = Field(None, description="Second place where relative image paths are looked for.")
    batch_size: PositiveInt = Field(32, description="Rows that run at a time.")


class RecordsSpec(DataSpec):
    """Which records are answered."""

    task: str | None = Field(None, description="Scoring task, or module:function. [default: each record's, or boxed]")
    prefill_tokens: PositiveInt = Field(
        8192, description="Prompts run together up to so many tokens; a longer one runs alone."
    )
    cache_gb: PositiveFloat | None = Field(
        None,
        le=1e6,
        description="GB for keys and values; rows wait for room. [default: what --batch_size rows may need]",
    )
    most: PositiveInt | None = Field(None, description="Take only the first so many records.")
    out: Path | None = Field(None, description="Write scores and answers to this JSON file.")


class EvaluateSpec(DecodingSpec, RecordsSpec):
    """The flags of `mirage-ds evaluate`."""

    samples: PositiveInt = Field(1, description="Answers a record: pass@k, majority and spread; not for greedy.")
    latents: str | None = Field(
        None,
        description="Score under these conditions instead, separated by commas: own,swap,… (`mirage-ds docs "
        "controls`; `mirage-ds controls` has more flags).",
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.samples > 1 and self.decoding == "greedy":
            raise ValueError(f"--samples {self.samples}: greedy answers are all alike; add --decoding sampled or paper")
        return self


class QuestionSpec(BaseModel):
    """What is asked."""

    prompt: str = Field(description="The question, with <image> where an image stands.")
    image: tuple[Path, ...] = Field((), description="Input image; may be given several times.")
    save_latents: Path | None = Field(
        None, description="Write tokens, latents and hidden states to this .safetensors file."
    )


class GenerateSpec(DecodingSpec, QuestionSpec):
    """The flags of `mirage-ds generate`."""
