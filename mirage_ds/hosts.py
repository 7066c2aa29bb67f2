"""The hostfile that `deepspeed --hostfile` reads: one `host slots=N` a line. Imports no torch."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from mirage_ds.errors import EXIT_USER_ERROR, UserError, reason, shown

# DeepSpeed reads no further than the number; what may stand behind it are other launchers' words (max_slots=4).
_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)(\s.*)?")


class Host(NamedTuple):
    """One line of a hostfile.

    Attributes:
        name: what ssh is given.
        slots: ranks that start on it, one a GPU.
    """

    name: str
    slots: int


def parse_hosts(text: str, source: str) -> tuple[Host, ...]:
    """Return the hosts of a hostfile's text, in its order: the first is rank 0's.

    Args:
        source: how the file is called in messages.

    Raises:
        UserError: a line that DeepSpeed cannot read, a host without slots or named twice, no host at all.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{source} line {number}"
        match = _LINE.fullmatch(line)
        if not match:
            raise UserError(f"{where}: {shown(line)} names no host and slots; write `host slots=N`, N its GPUs")
        name, count = match[1], int(match[2])
        if not count:
            raise UserError(f"{where}: {name} has 0 slots; write how many ranks it runs, or remove the line")
        if name in slots:
            raise UserError(f"{where}: {name} stands there twice; keep one line with all its slots")
        slots[name] = count
    if not slots:
        raise UserError(f"{source}: no host in it; write one `host slots=N` a line")
    return tuple(Host(name, count) for name, count in slots.items())


def read_hosts(path: Path) -> tuple[Host, ...]:
    """Read a hostfile; UserError as `parse_hosts`, or when the file cannot be read.

    DeepSpeed itself goes on with this machine alone when the file is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read ({reason(error)}); write `host slots=N` lines") from None
    return parse_hosts(text, str(path))


def main() -> None:
    """Print the first host and the number of ranks of the hostfile in sys.argv, for launch/*.sh."""
    try:
        hosts = read_hosts(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_USER_ERROR)
    print(hosts[0].name, sum(host.slots for host in hosts))  # noqa: T201


if __name__ == "__main__":
    main()
