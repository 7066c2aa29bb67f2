"""What a file of records is, by its first bytes: JSON lines, an array, CSV, Parquet, Arrow, or to be converted."""

import re
import shlex
from pathlib import Path
from typing import Literal

from mirage_ds.errors import UserError

Kind = Literal["parquet", "arrow", "array", "table", "lines"]

HEAD_BYTES = 4096
BOM = b"\xef\xbb\xbf"
# In a cure, FILE and NEW stand for the file's name and for that of the converted one.
_UNPACK = "unpack it first: {} -dc FILE > NEW.jsonl"
_RECODE = "save it as UTF-8: iconv -f {} -t UTF-8 FILE > NEW.jsonl"
_TABLE = """python -c "import pandas; pandas.{}, dtype=str).to_csv('NEW.csv', index=False)\""""
_EXCEL = ("an Excel table", _TABLE.format("read_excel('FILE'"))
# How a file begins, as a pattern; what it is, and the cure.
_SIGNS = (
    (rb"\x1f\x8b", "compressed with gzip", _UNPACK.format("gzip")),
    (rb"BZh", "compressed with bzip2", _UNPACK.format("bzip2")),
    (rb"\xfd7zXZ\0", "compressed with xz", _UNPACK.format("xz")),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK.format("zstd")),
    (rb"\x04\x22\x4d\x18", "compressed with lz4", _UNPACK.format("lz4")),
    # By the name of the first file in it.
    (rb"PK\x03\x04.{26}(\[Content_Types|_rels/|docProps/|xl/)", *_EXCEL),
    (rb"\xd0\xcf\x11\xe0", *_EXCEL),
    (rb"PK\x03\x04", "a zip archive", "unpack it first: unzip FILE"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x FILE"),
    (rb".{257}ustar", "a tar archive", "unpack it first: tar -xf FILE"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _RECODE.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _RECODE.format("UTF-16")),
    (rb"[{\[]\0", "UTF-16 text", _RECODE.format("UTF-16LE")),
    (rb"\0[{\[]", "UTF-16 text", _RECODE.format("UTF-16BE")),
    (rb"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (rb"<!DOCTYPE|<html", "an HTML page", "download the file itself"),
    (rb".{0,15}\0", "a binary file", "write the records as JSON, one object a line"),
    (rb"\{\s*\n\s*\"", "JSON over several lines", "write one object a line: jq -c . FILE > NEW.jsonl"),
)
_ROWS = re.compile(rb"\[\s*\{")
# A first line of names with separators between them.
_NAMES = re.compile(rb"[\"']?[A-Za-z_][\w .-]*[\"']?[,;\t]")


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
    # Whatever is first in it.
    signs = ((rb"PK\x03\x04", *_EXCEL), *_SIGNS) if suffix == ".xlsx" else _SIGNS
    for sign, what, cure in signs:
        if re.match(sign, head, re.DOTALL):
            raise UserError(f"{path}: {what}, not records; {_for_file(cure, path)}")
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
