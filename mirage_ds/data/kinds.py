"""What a file of records is, by its first bytes: JSON lines, an array, CSV, Parquet, Arrow, or to be converted."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from mirage_ds.errors import UserError

Kind = Literal["parquet", "arrow", "array", "table", "lines"]

HEAD_BYTES = 4096
BOM = b"\xef\xbb\xbf"
_ROWS = re.compile(rb"\[\s*\{")
# A first line of names with separators between them.
_NAMES = re.compile(rb"[\"']?[A-Za-z_][\w .-]*[\"']?[,;\t]")


@cache
def _signs() -> list[dict[str, str]]:
    """Read kinds.yaml: what is no file of records."""
    return list(yaml.safe_load(Path(__file__).with_name("kinds.yaml").read_text(encoding="utf-8")))


def head_of(path: Path) -> bytes:
    """Read the beginning of a file, without the mark that some editors put before UTF-8 and without white space."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES).removeprefix(BOM).lstrip(b" \t\r\n")


def kind_of(path: Path) -> Kind:
    """Tell what a file of records is.

    Raises:
        UserError: it has to be converted first; it says what the file is, and the command.
        OSError: it cannot be read.
    """
    head, suffix = head_of(path), path.suffix.lower()
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return "parquet"
    # As Feather has it, and as `datasets` saves it.
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    for sign in _signs():
        if sign.get("suffix", suffix) == suffix and re.match(sign["begins"].encode(), head, re.DOTALL):
            raise UserError(f"{path}: {sign['is']}, not records; {_for_file(sign['cure'], path)}")
    if _ROWS.match(head):
        return "array"
    # What follows could be JSON lines of which the first is broken, so the second line must not look like one.
    rest = head.partition(b"\n")[2].lstrip()
    named = suffix in (".csv", ".tsv") and not head.startswith(b"{")
    return "table" if named or (_NAMES.match(head) and not rest.startswith(b"{")) else "lines"


def _for_file(cure: str, path: Path) -> str:
    """Put the names of a file and of the converted one into a cure."""
    for word, name in (("FILE", path), ("NEW", path.with_name(f"{path.name.split('.')[0] or 'rows'}_converted"))):
        cure = cure.replace(word, str(name) if "python" in cure else shlex.quote(str(name)))
    return cure
