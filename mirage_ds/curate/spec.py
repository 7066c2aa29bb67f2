"""The flags of `mirage-ds data vary`, `mix`, `import` and `rationalize`. Imports little: `--help` is quick."""

from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import BaseModel, Field, HttpUrl, model_validator

from mirage_ds.chat import USUAL_KEY_VARIABLE
from mirage_ds.config.columns import COLUMNS_HELP, ColumnsText, Layout
from mirage_ds.tasks.task import Settings

Kind = Literal[
    "helper-input", "helper-rows", "helper-text", "helper-swap", "helper-noise", "no-image", "helper-only"
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
QUESTION = "Read the path."


class ReadSpec(BaseModel, extra="forbid"):
    """How the given records are read."""

    image_root: Path | None = Field(None, description="second place where relative image paths are looked for")
    columns: ColumnsText = Field(None, description=COLUMNS_HELP[0].lower() + COLUMNS_HELP[1:])


class RewriteSpec(ReadSpec, Settings):
    """How the given records are read, and what is drawn."""

    seed: int = Field(0, description="the same seed gives the same bytes")


class VarySpec(RewriteSpec):
    """How records are varied."""

    most: int | None = Field(None, ge=1, description="take only the first so many records")
    question: str = Field(QUESTION, description="helper-only: what is asked")
    task: str | None = Field(None, description="helper-text: task to use [default: the record's own task]")


class ImportSpec(ReadSpec, Settings):
    """Whose rows are read, and how."""

    layout: Layout | None = Field(None, description="the trainer whose layout the rows have [default: recognised]")
    helper_key: str | None = Field(None, description="the same as --columns helper=…")
    split: str = Field("train", description="of a data set of the Hub")
    most: int | None = Field(None, ge=1, description="take only the first so many rows")


class MixSpec(RewriteSpec):
    """How records are mixed."""

    count: int | None = Field(None, ge=1, le=10**9, description="rows to write [default: as many as there can be]")
    rest: Path | None = Field(None, description="another folder to write, with the rows that are not taken")


class RationalizeSpec(ReadSpec):
    """Who writes rationales, from what, and how."""

    out: Path = Field(description="folder to write: data.jsonl, rationalize.json, and replies.jsonl to go on from")
    samples: int = Field(3, ge=1, le=1000, description="replies for each row; each that is accepted is a row")
    endpoint: HttpUrl | None = Field(None, description="OpenAI-compatible server, like http://host:8000/v1")
    model_name: str | None = Field(None, min_length=1, description="--endpoint: the model's name there")
    key_variable: str | None = Field(
        None, min_length=1, description=f"--endpoint: environment variable with the key [default: {USUAL_KEY_VARIABLE}]"
    )
    parallel: int = Field(8, ge=1, le=1024, description="--endpoint: requests at a time, at most")
    timeout: float = Field(300, gt=0, le=86400, description="--endpoint: seconds to wait for the server")
    tries: int = Field(6, ge=1, le=100, description="--endpoint: requests for one reply, at most")
    limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="--endpoint: how the server calls --max_new_tokens"
    )
    model: str | None = Field(None, min_length=1, description="folder or hub id of a model that writes them here")
    batch_size: int = Field(8, ge=1, description="--model: rows at a time")
    prompt: Path | None = Field(None, description="text template of the request [default: the one that comes along]")
    task: str | None = Field(None, description="whose scorer judges the answer [default: the record's own task]")
    temperature: float = Field(0.7, ge=0, le=2, description="how freely tokens are drawn")
    max_new_tokens: int = Field(1024, ge=1, description="tokens of a reply, at most")
    seed: int | None = Field(None, ge=0, lt=2**31, description="of replies [default: 0; with --endpoint none is sent]")
    max_pixels: int | None = Field(None, ge=784, description="larger images are made smaller before they are shown")
    most: int | None = Field(None, ge=1, description="take only the first so many records")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.endpoint is None) == (self.model is None):
            raise ValueError("who writes? give --endpoint URL with --model_name, or --model FOLDER, one of them")
        if self.endpoint is not None and self.model_name is None:
            raise ValueError("--endpoint needs --model_name: what the server calls the model (/v1/models lists them)")
        if self.endpoint is not None and (self.endpoint.username or self.endpoint.password or self.endpoint.query):
            raise ValueError("--endpoint: holds a name, password or query; give the key by --key_variable")
        for flag in ("model_name", "key_variable"):
            if self.model is not None and getattr(self, flag) is not None:
                raise ValueError(f"--{flag} goes with --endpoint, not with --model; leave it out")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"-n {self.samples} at --temperature 0 asks for one text again and again: give -n 1")
        return self
