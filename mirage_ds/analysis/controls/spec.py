"""The conditions by name, and the flags of `mirage-ds controls`. Imports no torch: `--help` is quick."""

from pathlib import Path

from pydantic import Field

from mirage_ds.errors import UserError, closest
from mirage_ds.evaluate.spec import HelperSpec, ModelSpec, RecordsSpec

CONDITIONS = ("own", "first", "zero", "random", "matched", "swap", "oracle", "off", "text")
PATH = "path"


def parse_names(text: str, flag: str = "--latents") -> list[str]:
    """Read the flag's text: names with commas between them, each once; `own`, which all are compared with, comes first.

    Raises:
        UserError: an unknown name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = (*CONDITIONS, PATH)
    for name in names:
        if name not in known:
            raise UserError(f"{flag}: no condition {name!r}{closest(name, known)}; there are {', '.join(known)}")
    if not names:
        raise UserError(f"{flag} names no condition; there are {', '.join(known)}")
    return names if names == [PATH] else ["own", *(name for name in names if name != "own")]


class ControlsSpec(HelperSpec, ModelSpec, RecordsSpec):
    """What is compared; evaluate's flags keep their names and meanings."""

    latents: str = Field(
        ",".join(CONDITIONS),
        description="What is fed at the slots: conditions, separated by commas; path may be added.",
    )
    seed: int = Field(42, ge=0, lt=2**31, description="Of vectors, swaps, paths and resamples.")
    latent_targets: Path | None = Field(None, description="oracle and path: use the encoder that scaffold saved here.")
    latent_bank: Path | None = Field(None, description="Write own latents into this folder, for `mirage-ds serve`.")
    markdown: Path | None = Field(None, description="Write the tables to this Markdown file.")
