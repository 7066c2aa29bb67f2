"""The flags of `mirage-ds serve`. Imports little, so that the command line's `--help` is quick."""

from pathlib import Path
from typing import Literal, Self

from pydantic import DirectoryPath, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mirage_ds.evaluate.spec import LengthSpec

# Variable of the environment that holds the key.
KEY_VARIABLE = "MIRAGE_API_KEY"


class ServeSpec(LengthSpec):
    """How a model folder is served."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: every one that this machine has.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: a free one, which is printed.")
    api_key: str | None = Field(
        None, description=f"Key that clients must send; better in the environment, as {KEY_VARIABLE}."
    )
    files: DirectoryPath | None = Field(
        None, description="Folder below which file: URLs are read; without it, none are."
    )
    latents: Literal["own", "first", "zero", "random", "matched", "swap", "off", "text"] = Field(
        "own", description="What is fed at the slots, by the names of `mirage-ds docs controls`."
    )
    latent_bank: Path | None = Field(
        None, description="Folder of latents: own (or `controls`) writes it; swap and matched read it, random may."
    )
    seed: int = Field(42, ge=0, lt=2**31, description="Of random and matched latents and of swaps.")
    return_latents: bool = Field(False, description="Send what was fed at the slots beside each answer.")
    max_length: PositiveInt = Field(32_768, description="Tokens of a prompt with its answer, at most.")
    max_request_mb: PositiveFloat = Field(32, description="MB of a request, at most.")
    max_requests: PositiveInt = Field(256, description="Requests at a time, at most; more are answered 503.")
    rows: PositiveInt = Field(32, description="Answers that decode at a time.")
    prefill_tokens: PositiveInt = Field(
        8192, description="New prompts run together up to so many tokens; begun answers wait meanwhile."
    )
    cache_gb: PositiveFloat | None = Field(
        None, description="GB for keys and values; rows wait for room. [default: what --rows rows may need]"
    )
    grace: NonNegativeInt = Field(30, description="Seconds that requests have to end after SIGTERM or Ctrl-C.")

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        name = f"--latents {self.latents}"
        if self.latents in ("matched", "swap") and not self.latent_bank:
            raise ValueError(f"{name} is made of other questions' latents; give --latent_bank, a folder that has them")
        if self.latents in ("first", "zero", "off", "text") and self.latent_bank:
            raise ValueError(f"{name} takes nothing from --latent_bank; leave that out")
        return self
