"""Which of a row's own names mean what: `--columns question=…,answer=…,image=…,helper=…`. Imports nothing heavy."""

import re
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator

from mirage_ds.errors import UserError, closest, shown

Layout = Literal["swift", "llama-factory", "trl"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# Roles that one column has.
SINGLE = ("question", "answer", "messages", "region")
COLUMNS_HELP = (
    "Names of the records' own columns: question=…,answer=…,image=…,helper=…,region=… (or messages=…); image and "
    "helper may be given several times. [default: obvious names are recognised]"
)


class Columns(NamedTuple):
    """The names under which a user's rows hold what a record holds; empty where they are to be recognised.

    Attributes:
        messages: the conversation, in place of question and answer.
        layout: the trainer whose layout the rows have, where it is named.
        region: a box of the first input image (data/region.py).
    """

    question: str = ""
    answer: str = ""
    image: tuple[str, ...] = ()
    helper: tuple[str, ...] = ()
    messages: str = ""
    layout: Layout | None = None
    region: str = ""

    @property
    def named(self) -> list[tuple[str, str]]:
        """(role, column) of all that are named."""
        one = [(role, getattr(self, role)) for role in SINGLE if getattr(self, role)]
        return one + [(role, name) for role in ("image", "helper") for name in getattr(self, role)]


# For wherever rows are to be recognised.
RECOGNISED = Columns()


def parse_columns(text: str | None, layout: Layout | None = None) -> Columns:
    """Read `question=q,answer=a,image=before,image=after`.

    Raises:
        UserError: an unknown role, one without a name, or a conversation beside a question.
    """
    roles: dict[str, list[str]] = {role: [] for role in (*SINGLE, "image", "helper")}
    # A name may have commas.
    for part in re.split(r",(?=\s*\w+\s*=)", text) if text else ():
        role, _, name = (one.strip() for one in part.partition("="))
        if role not in roles:
            raise UserError(f"--columns {text}: {shown(role)} is no role{closest(role, roles)}; "
                            "write question=…,answer=…,image=…,helper=…, each with a column's name")  # fmt: skip
        if not name:
            raise UserError(f"--columns {text}: {role} has no column; write {role}=NAME")
        roles[role].append(name)
    for role in SINGLE:
        if len(roles[role]) > 1:
            raise UserError(f"--columns {text}: {role} is one column, and {len(roles[role])} are named; name one")
    question, answer, messages, region = ("".join(roles[role]) for role in SINGLE)
    if messages and (question or answer):
        raise UserError(f"--columns {text}: messages hold question and answer; leave these out")
    return Columns(question, answer, tuple(roles["image"]), tuple(roles["helper"]), messages, layout, region)


def _checked(text: str | None) -> str | None:
    parse_columns(text)
    return text


# A setting; parse_columns reads it.
ColumnsText = Annotated[str | None, AfterValidator(_checked)]
