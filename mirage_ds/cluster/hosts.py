"""The hostfile that `deepspeed --hostfile` reads: one `host slots=N` a line. Imports no torch."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from mirage_ds.data.folders import readable
from mirage_ds.errors import EXIT_USER_ERROR, UserError, shown
from mirage_ds.run.process import print_anything

# DeepSpeed reads no further than the number; what may stand behind it are other launchers' words (max_slots=4).
_LINE = re.compile(r"(\S+)[ \t]+slots=([0-9]+)([ \t].*)?")
# What ssh, pdsh and mpirun all take: a host name or an IPv4 address, perhaps with a user.
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9_][A-Za-z0-9._-]*")
# What is no name → what to write; the first that fits counts.
NO_NAMES: dict[str, str] = yaml.safe_load(Path(__file__).with_name("no_names.yaml").read_text(encoding="utf-8"))
# More than any host has GPUs or cores; a longer number is a slip.
MOST_SLOTS = 1024


class Host(NamedTuple):
    """One line of a hostfile.

    Attributes:
        name: what ssh is given, perhaps `user@host`.
        slots: ranks that start on it, one a GPU.
    """

    name: str
    slots: int

    @property
    def address(self) -> str:
        """What other hosts connect to: the name without its user."""
        return self.name.rpartition("@")[2]


def parse_hosts(text: str, source: str) -> tuple[Host, ...]:
    """Return the hosts of a hostfile's text, in its order: the first is rank 0's.

    Args:
        source: how the file is called in messages.

    Raises:
        UserError: a line that DeepSpeed, ssh or mpirun cannot read, a host without slots or named twice, no host at
            all.
    """
    # The launchers read the file themselves: what is refused here would reach them.
    if text.startswith("\ufeff"):
        raise UserError(f"{source} line 1: begins with a byte order mark; save it as UTF-8 without one")
    found: dict[str, Host] = {}
    # Lines as the launchers have them: str.splitlines knows more ends than they do.
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{source} line {number}"
        match = _LINE.fullmatch(line)
        if not match:
            raise UserError(f"{where}: {shown(line)} names no host and slots; write `host slots=N`, N its GPUs")
        name = match[1]
        if not _NAME.fullmatch(name):
            how = next(how for pattern, how in NO_NAMES.items() if re.search(pattern, name))
            raise UserError(f"{where}: {shown(name)} is no name that ssh and mpirun both take: {how}")
        # Cut, since int() refuses thousands of digits.
        host = Host(name, int(match[2].lstrip("0")[:5] or 0))
        if not 0 < host.slots <= MOST_SLOTS:
            has = f"{host.name} has slots={match[2][:30]}"
            raise UserError(f"{where}: {has}; write N as the number of its GPUs, or remove the line")
        # Another user or other letters do not make another host.
        address = host.address.lower().rstrip(".")
        if address in found:
            raise UserError(f"{where}: {host.address} stands there twice; keep one line with all its slots")
        found[address] = host
    if not found:
        raise UserError(f"{source}: no host in it; write one `host slots=N` a line")
    return tuple(found.values())


def read_hosts(path: Path) -> tuple[Host, ...]:
    """Read a hostfile; UserError as `parse_hosts`, or when the file cannot be read.

    DeepSpeed itself goes on with this machine alone when the file is missing.
    """
    with readable(f"--hostfile {path}", "write `host slots=N` lines"):
        return parse_hosts(path.read_text(encoding="utf-8"), str(path))


def main() -> None:
    """Print the first host's address and the number of ranks of the hostfile in sys.argv, for launch/*.sh."""
    print_anything()
    try:
        hosts = read_hosts(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_USER_ERROR)
    print(hosts[0].address, sum(host.slots for host in hosts))  # noqa: T201


if __name__ == "__main__":
    main()
