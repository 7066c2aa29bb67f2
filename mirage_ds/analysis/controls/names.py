"""The conditions by name. Imports no torch: the command line asks for them."""

from __future__ import annotations

from mirage_ds.errors import UserError, closest

CONDITIONS = ("own", "first", "zero", "random", "matched", "swap", "oracle", "off", "text")
PATH = "path"


def parse_names(text: str) -> list[str]:
    """Read --latents: names with commas between them, each once; `own`, which all are compared with, comes first.

    Raises:
        UserError: an unknown name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = (*CONDITIONS, PATH)
    for name in names:
        if name not in known:
            raise UserError(f"--latents: no condition {name!r}{closest(name, known)}; there are {', '.join(known)}")
    if not names:
        raise UserError(f"--latents names no condition; there are {', '.join(known)}")
    return names if names == [PATH] else ["own", *(name for name in names if name != "own")]
